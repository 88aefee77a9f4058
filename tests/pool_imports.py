"""What the ranks of a pool have imported when they are forked.

A fork's garbage collector leaves it alone: it would touch, and so copy, all of its pages.
"""

import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from megatron_gpc.run.imports import many_imports  # noqa: E402

with many_imports():
    from megatron_gpc.mcore import cpu

    cpu.install()
    import megatron_gpc.train  # noqa: F401
