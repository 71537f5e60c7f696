"""Types of ml_collections.config_flags, as far as this project uses it."""

from typing import Any

from absl import flags

def DEFINE_config_file(
    name: str,
    default: str | None = ...,
    help_string: str = ...,
    flag_values: flags.FlagValues = ...,
    lock_config: bool = ...,
    accept_new_attributes: bool = ...,
    sys_argv: list[str] | None = ...,
    **kwargs: Any,
) -> flags.FlagHolder[Any]: ...
def DEFINE_config_dict(
    name: str, config: Any, help_string: str = ..., lock_config: bool = ..., **kwargs: Any
) -> flags.FlagHolder[Any]: ...
def get_config_filename(config_flag: Any) -> str: ...
def get_override_values(config_flag: Any) -> dict[str, Any]: ...
