"""Configuration from a YAML file plus ``section.key=value`` overrides, and to YAML again. No torch here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from megatron_vespo.config import Config, SourceSection
from megatron_vespo.errors import UserError
from megatron_vespo.upstream import nearest


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 1e-3 as text; everybody means the number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^[-+]?\.(inf|Inf|INF)$|^\.(nan|NaN|NAN)$"),
    list("-+0123456789."),
)
# The resolver for integers must win where both match; it was registered first, in SafeLoader.


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {error}") from error


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"override '{override}': expected section.key=value")
    *sections, leaf = key.split(".")
    node: Any = tree
    for section in sections:
        node = node.setdefault(section, {})
        if not isinstance(node, dict):
            raise UserError(f"override '{override}': '{section}' is a value, not a section")
    node[leaf] = _parse_yaml(value, f"override '{override}'")


def _known_keys(location: tuple[int | str, ...]) -> list[str]:
    """Keys that exist beside the last part of an error's location."""
    model: type[BaseModel] = Config
    if "(source)" in location:  # one of data's sources
        model, location = SourceSection, location[location.index("(source)") + 1 :]
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not (isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)):
            return []
        model = field.annotation
    return list(model.model_fields)


def _explain(error: ValidationError, where: str) -> str:
    """One line for each thing that is wrong, naming the key."""
    lines = []
    for item in error.errors():
        # Parts in brackets are not keys: they say which form of a value it was taken for.
        location = tuple(part for part in item["loc"] if not str(part).startswith("("))
        key = ".".join(str(part) for part in location)
        if item["type"] == "extra_forbidden":
            lines.append(f"{key}: unknown key{nearest(str(location[-1]), _known_keys(item['loc']))}")
        elif item["type"] == "missing":
            lines.append(f"{key}: missing")
        elif item["type"] == "value_error":
            lines.append(f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"]))
        else:
            lines.append(f"{key}: {item['msg']}, not {item['input']!r}")
    return "\n".join(f"{where}: {line}" for line in lines)


def parse_config(tree: dict[str, Any], where: str = "config") -> Config:
    """Validate a nested dictionary.

    Raises:
        UserError: Names every key that is unknown (with the nearest known one), missing or of the wrong type.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(_explain(error, where)) from error


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file and apply ``section.key=value`` overrides, values in YAML syntax.

    Raises:
        UserError: The file is missing or not YAML, an override is malformed, or a key is wrong.
    """
    tree = read_yaml(path)
    for override in overrides:
        _apply_override(tree, override)
    return parse_config(tree, str(path))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file of sections, not validated.

    Raises:
        UserError: The file is missing, not YAML or not a mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"config file {path}: not found")
    tree = _parse_yaml(path.read_text(encoding="utf-8"), str(path))
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of sections")
    return tree


def dump_config(config: Config) -> str:
    """The resolved configuration as YAML; ``load_config`` reads it back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
