"""Packages whose names are imported when they are first used, so that nobody waits for libraries in vain.

Such a package imports its names `if TYPE_CHECKING`, as type checkers and readers expect, and ends with
`__getattr__ = deferred_names(__name__, __file__)`.
"""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["deferred_names", "names_for_types"]


def deferred_names(package: str, file: str) -> Callable[[str], Any]:
    """The `__getattr__` of a package: what it imports for types is imported once it is asked for."""
    places = names_for_types(ast.parse(Path(file).read_text(encoding="utf-8")))

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, original = places[name]
        value = getattr(import_module(module), original)
        setattr(sys.modules[package], name, value)
        return value

    return get


def names_for_types(tree: ast.Module) -> dict[str, tuple[str, str]]:
    """What a file imports `if TYPE_CHECKING`: its name there, and the module and name that it comes from."""
    return {
        alias.asname or alias.name: (node.module, alias.name)
        for block in tree.body
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
