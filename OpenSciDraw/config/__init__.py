"""The config: every key with its type, unit, default and meaning; files, overrides, old keys, and where a value came from.

May use: utils.
"""

from OpenSciDraw.config.drawing import Drawing, drawing_as_asked, drawing_of_run
from OpenSciDraw.config.files import load_config, load_saved_config
from OpenSciDraw.config.objective_sections import (
    DistillConfig,
    PreferConfig,
    PreferenceConfig,
    RewardConfig,
    TokenRoutingConfig,
)
from OpenSciDraw.config.schema import SECRET_KEYS, Config
from OpenSciDraw.config.sections import EncodeConfig, EvaluateConfig, SourceConfig
from OpenSciDraw.config.text import save_config

__all__ = [
    "SECRET_KEYS", "Config", "DistillConfig", "Drawing", "EncodeConfig", "EvaluateConfig", "PreferConfig", "PreferenceConfig",
    "RewardConfig", "SourceConfig", "TokenRoutingConfig", "drawing_as_asked", "drawing_of_run", "load_config", "load_saved_config",
    "save_config",
]  # fmt: skip
