"""The configuration of a run.

schema (every key, its default, its meaning), types (what keys are made of), file (YAML and
overrides), layout (how many processes; layouts that cannot work), parts (a user's own: reward,
loss, schedule, sink).
"""

from megatron_gpc.config.schema import (
    CheckpointConfig,
    ClipConfig,
    Config,
    DataConfig,
    DiagnosticsConfig,
    EvalConfig,
    GuardConfig,
    KLConfig,
    LogConfig,
    MegatronConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    RolloutConfig,
    ServerConfig,
    SGLangConfig,
    TrainConfig,
)
