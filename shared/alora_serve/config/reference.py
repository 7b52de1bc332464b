"""The settings as the documentation shows them."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ByteSize, SecretStr
from pydantic.fields import FieldInfo

from alora_serve.config.groups import GROUPS, SettingsGroup
from alora_serve.config.names import SECRET_NAMES, env_name, flag_name


def configuration_rows(group: type[SettingsGroup]) -> Iterator[tuple[str, str, str, str]]:
    """For each setting that the group adds: flag, variable, default, description."""
    inherited = {} if group is GROUPS[0] else SettingsGroup.model_fields
    for name, field in group.model_fields.items():
        if name not in inherited:
            flag = "" if name in SECRET_NAMES else flag_name(name)
            yield flag, env_name(name), _default(field), field.description or ""


def configuration_table() -> str:
    """All settings as the body of a Markdown document, a table a group."""
    lines: list[str] = []
    for group in GROUPS:
        lines += [f"## {group.__name__.removesuffix('Settings')}", "", group.__doc__ or "", ""]
        lines += ["| flag | variable | default | meaning |", "|---|---|---|---|"]
        lines += [
            f"| {_code(flag)} | {_code(variable)} | {_code(default)} | {description} |"
            for flag, variable, default, description in configuration_rows(group)
        ]
        lines.append("")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    match field.default:
        case None | () | SecretStr():
            return ""
        case ByteSize() as size:
            return size.human_readable()
        case value:
            return str(value)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""
