"""The config: every key with its type, unit, default and meaning; files, overrides, old keys, and where a value came from.

May use: utils.
"""

from OpenSciDraw.config.files import load_config, load_saved_config
from OpenSciDraw.config.groups import PreferConfig
from OpenSciDraw.config.schema import SECRET_KEYS, Config
from OpenSciDraw.config.sections import EncodeConfig, EvaluateConfig, PreferenceConfig
from OpenSciDraw.config.text import save_config

__all__ = [
    "SECRET_KEYS", "Config", "EncodeConfig", "EvaluateConfig", "PreferConfig", "PreferenceConfig",
    "load_config", "load_saved_config", "save_config",
]  # fmt: skip
