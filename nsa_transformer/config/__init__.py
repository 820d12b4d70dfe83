"""Every setting of the project as a plain dataclass, checked when it is built.

`configs/*.yaml` holds the same keys with the same defaults; `build_config` merges a nested mapping onto these classes.
A wrong key, type, value or combination raises `ConfigError` whose text names the override to type instead.
This package imports the standard library alone, so that the kernels can use `NSAConfig` without Hydra.
"""

from nsa_transformer.config.fields import ConfigError
from nsa_transformer.config.mapping import GROUPS, all_keys, build_config, to_dict, unknown_key_message
from nsa_transformer.config.model import ModelConfig, MoEConfig, NSAConfig
from nsa_transformer.config.run import (
    Config,
    CudaKernelsConfig,
    DataConfig,
    ExpertOffloadingConfig,
    KVCacheConfig,
    LoggingConfig,
    MemoryConfig,
    MixtureSource,
    OptimizerOffloadingConfig,
    ProfilingConfig,
    RecipeConfig,
    TrainingConfig,
    WandbConfig,
    unsupported_options,
)

__all__ = [
    "GROUPS",
    "Config",
    "ConfigError",
    "CudaKernelsConfig",
    "DataConfig",
    "ExpertOffloadingConfig",
    "KVCacheConfig",
    "LoggingConfig",
    "MemoryConfig",
    "MixtureSource",
    "MoEConfig",
    "ModelConfig",
    "NSAConfig",
    "OptimizerOffloadingConfig",
    "ProfilingConfig",
    "RecipeConfig",
    "TrainingConfig",
    "WandbConfig",
    "all_keys",
    "build_config",
    "to_dict",
    "unknown_key_message",
    "unsupported_options",
]
