"""Megatron GPC: reinforcement learning with gradient-preserving entropy control."""

__version__ = "0.1.0"
