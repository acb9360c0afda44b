"""Objects of the user's own, named in the configuration: ``path/to/file.py:name`` or ``package.module:name``."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_vespo.errors import UserError


def load_object(spec: str, kind: str) -> Any:
    """Import what ``spec`` names.

    Args:
        spec: ``path/to/file.py:name`` or ``package.module:name``.
        kind: What it is to be, for error messages: ``reward``.

    Raises:
        UserError: The file, module or name does not exist. Errors raised by the user's own module while it is imported
            pass through with their traceback.
    """
    source, _, name = spec.rpartition(":")
    module = _load_file(Path(source), kind) if source.endswith(".py") else _load_module(source, kind)
    found = getattr(module, name, None)
    if found is None:
        raise _not_in(source, name, spec, kind)
    return found


def check_object(spec: str, kind: str) -> None:
    """Look whether a file has what ``spec`` names, without running it; of a module, whether its name is one.

    Raises:
        UserError: As :func:`load_object`, or the file is not Python.
    """
    source, _, name = spec.rpartition(":")
    if not source.endswith(".py"):
        _check_module_name(source)
        return
    path = _existing_file(Path(source), kind)
    try:
        tree = ast.parse(path.read_bytes())
    except SyntaxError as error:
        raise UserError(f"{kind} file {path}:{error.lineno}: not valid Python ({error.msg})") from error
    if not {name, "*", "__getattr__"} & set(_names_in(tree)):
        raise _not_in(source, name, spec, kind)


def _not_in(source: str, name: str, spec: str, kind: str) -> UserError:
    return UserError(f"{kind} {spec!r}: {source} has no {name!r}")


def _names_in(tree: ast.Module) -> Iterator[str]:
    """What is defined, assigned or imported anywhere in it, and so perhaps at its top."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield node.name
            case ast.Name(ctx=ast.Store()):
                yield node.id
            case ast.alias():
                yield node.asname or node.name


def _existing_file(path: Path, kind: str) -> Path:
    path = path.expanduser().resolve()
    if not path.is_file():
        raise UserError(f"{kind} file {path} does not exist")
    return path


def _load_file(path: Path, kind: str) -> ModuleType:
    path = _existing_file(path, kind)
    # One file may define several objects, and be imported by its own package too.
    for module in list(sys.modules.values()):
        if getattr(module, "__file__", None) == str(path):
            return module
    # The name is made from the whole path: two files of one name must not share a module.
    name = "megatron_vespo_user_" + re.sub(r"\W", "_", str(path))
    module_spec = importlib.util.spec_from_file_location(name, path)
    assert module_spec is not None and module_spec.loader is not None  # holds for every path that ends in .py
    module = importlib.util.module_from_spec(module_spec)
    # Dataclasses and pickle look a module up by its name.
    sys.modules[name] = module
    try:
        module_spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _check_module_name(name: str) -> None:
    if not re.fullmatch(r"\w+(\.\w+)*", name):
        raise UserError(
            f"{name!r} is neither a module nor a .py file; write package.module:function or file.py:function"
        )


def _load_module(name: str, kind: str) -> ModuleType:
    _check_module_name(name)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # A module that the user's module fails to import is their error, and needs their traceback.
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{kind} module {name!r} cannot be imported: there is no module {error.name!r}") from error
