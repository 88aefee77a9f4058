"""What a launch pad has imported: what ranks, servers, launchers and tools need."""

import pool_imports  # noqa: F401

from megatron_gpc.run.imports import many_imports

with many_imports():
    import torch._dynamo
    import torch.utils.tensorboard  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import megatron_gpc.commands.parity
    import megatron_gpc.rollout.samples
    import megatron_gpc.server.app  # noqa: F401
