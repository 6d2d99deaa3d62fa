"""Names of a package that are imported when they are first used."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Callable
from typing import Any


def lazy_names(package: str) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """`__all__`, `__getattr__` and `__dir__` for the package `package`, given its `__name__`.

    Its names are those that its own file imports under `if TYPE_CHECKING:`, so that what type
    checkers find and what there is are one list.
    """
    module = sys.modules[package]
    with open(str(module.__file__), encoding="utf-8") as file:
        own_file = ast.parse(file.read())
    home = {
        alias.name: node.module
        for block in own_file.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }

    def find(name: str) -> Any:
        if name not in home:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(home[name]), name)
        setattr(module, name, value)  # found without this function the next time
        return value

    def names() -> list[str]:
        return sorted([*vars(module), *home])

    return [*home], find, names
