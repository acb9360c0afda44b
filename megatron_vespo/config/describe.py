"""What the sections say of themselves, for ``train --help`` and docs/config.md: types, limits, defaults, meanings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo

from megatron_vespo.config import Config, Section


@dataclass(frozen=True)
class Key:
    """One key of a section.

    Attributes:
        name: Without the section's.
        kind: Its type and limits in words, such as ``int, >= 1``.
        default: In YAML; ``required`` where there is none.
        meaning: Its docstring in one line; empty where the value is a section.
        section: The section that the value is, if it always is one.
    """

    name: str
    kind: str
    default: str
    meaning: str
    section: type[Section] | None


def places() -> dict[type[Section], list[str]]:
    """Every section in the order of the configuration, with where it may stand.

    Returns:
        Dotted paths, that of ``Config`` empty. ``*`` is a name of the user's own, or a place in a list.
    """
    found: dict[type[Section], list[str]] = {}

    def visit(section: type[Section], path: str) -> None:
        found.setdefault(section, []).append(path)
        for name, field in section.model_fields.items():
            for inner, below in _sections_in(field.annotation):
                visit(inner, f"{path}.{name}{below}".removeprefix("."))

    visit(Config, "")
    return found


def keys_of(section: type[Section]) -> list[Key]:
    """The keys of a section, in order."""
    keys = []
    for name, field in section.model_fields.items():
        kind = field.annotation
        inner = kind if isinstance(kind, type) and issubclass(kind, Section) else None
        default = "required" if field.is_required() else "" if inner else _as_yaml(field.get_default())
        words = ", ".join([type_name(kind), *_limits(field.metadata)])
        keys.append(Key(name, words, default, one_line(field.description), inner))
    return keys


def describe_config() -> str:
    """Every section and key with type, default and meaning: the body of ``train --help``."""
    lines: list[str] = []
    for section, paths in places().items():
        lines += ["", f"{', '.join(paths) or 'all sections'}:  {one_line(section.__doc__)}"]
        for key in keys_of(section):
            if key.section is None:
                default = key.default if key.default == "required" else f"default {key.default}"
                name = f"{paths[0]}.{key.name}".removeprefix(".")
                lines.append(f"  {name}  ({key.kind}; {default})\n      {key.meaning}")
    return "\n".join(lines)


def one_line(text: str | None) -> str:
    """A docstring without its line breaks."""
    return " ".join((text or "").split())


def type_name(kind: Any) -> str:
    """A type as a user of YAML would say it: ``rl | sft``, ``list[int]``, ``float | null``."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        limits = [limit for item in arguments[1:] if isinstance(item, FieldInfo) for limit in _limits(item.metadata)]
        return " ".join([type_name(arguments[0]), *limits])
    if origin in (Union, UnionType):
        return " | ".join(type_name(argument) for argument in arguments)
    if origin is Literal:
        return " | ".join(map(str, arguments))
    if origin in (dict, list):
        return f"{origin.__name__}[{', '.join(type_name(argument) for argument in arguments)}]"
    if kind in (NoneType, Any):
        return "null" if kind is NoneType else "any"
    return "section" if issubclass(kind, Section) else str(kind.__name__)


def _limits(metadata: Iterable[Any]) -> Iterator[str]:
    for item in metadata:
        match item:
            case Ge():
                yield f">= {item.ge}"
            case Gt():
                yield f"> {item.gt}"
            case Le():
                yield f"<= {item.le}"
            case Lt():
                yield f"< {item.lt}"
            case MinLen():
                yield "not empty"


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()


def _sections_in(kind: Any, below: str = "") -> Iterator[tuple[type[Section], str]]:
    """Sections that a value may be or hold, with ``.*`` for each name or place between."""
    if isinstance(kind, type) and issubclass(kind, Section):
        yield kind, below
    deeper = f"{below}.*" if get_origin(kind) in (dict, list) else below
    for argument in get_args(kind):
        yield from _sections_in(argument, deeper)
