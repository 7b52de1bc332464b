"""Settings: what each means, where values come from, and how a wrong one stops the start."""

from alora_serve.config.cache_directory import CACHE_DIRECTORY_VARIABLE, default_cache_directory
from alora_serve.config.groups import (
    ENV_PREFIX,
    GROUPS,
    AdapterSettings,
    EngineSettings,
    FrontDoorSettings,
    ModelSettings,
    PrefillSettings,
    RouterSettings,
    SecretSettings,
    ServerSettings,
    SettingsGroup,
    ShareSettings,
    StoreSettings,
)
from alora_serve.config.loading import load_settings, run_with_settings
from alora_serve.config.names import SECRET_NAMES, env_name, flag_name, known_names
from alora_serve.config.reference import configuration_table

__all__ = [
    "CACHE_DIRECTORY_VARIABLE",
    "ENV_PREFIX",
    "GROUPS",
    "SECRET_NAMES",
    "AdapterSettings",
    "EngineSettings",
    "FrontDoorSettings",
    "ModelSettings",
    "PrefillSettings",
    "RouterSettings",
    "SecretSettings",
    "ServerSettings",
    "SettingsGroup",
    "ShareSettings",
    "StoreSettings",
    "configuration_table",
    "default_cache_directory",
    "env_name",
    "flag_name",
    "known_names",
    "load_settings",
    "run_with_settings",
]
