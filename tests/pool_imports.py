"""What the ranks of a pool have imported when they are forked."""

import gc
import os

os.environ["CUDA_VISIBLE_DEVICES"] = ""

from megatron_gpc.mcore import cpu

cpu.install()

import megatron_gpc.train  # noqa: E402, F401

gc.freeze()  # a fork's collector would touch, and so copy, all of these pages
