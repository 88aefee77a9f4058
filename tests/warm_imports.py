"""What a launch pad has imported: what ranks, servers, launchers and tools need."""

import pool_imports  # noqa: F401
import torch._dynamo  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

import megatron_gpc.rollout.samples  # noqa: F401
import megatron_gpc.server.app  # noqa: F401
