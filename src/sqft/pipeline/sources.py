"""The source files that a stage runs, found by its imports; they enter its identity in a development install.

A stage runs the module of its step and whatever that imports, inside functions too. `from package import
name` leads to the module that defines the name, not to all of the package.
"""

import ast
from functools import cache
from pathlib import Path
from typing import Any

from sqft import __version__
from sqft.artifacts import digest_file
from sqft.deferred import names_for_types

__all__ = ["source_digest", "source_files"]

ROOT = Path(__file__).parents[1]


@cache  # a process runs the source it has imported, whatever is edited meanwhile
def source_digest(module: str) -> dict[str, Any]:
    """The sha256 of every file that a module runs; of an installed package, its version."""
    if "site-packages" in ROOT.parts:
        return {"sqft": __version__}
    return {path.relative_to(ROOT).as_posix(): _digest(path) for path in source_files(module)}


def source_files(module: str) -> list[Path]:
    """The files of this package that a module reaches by its imports, its own first."""
    found: dict[Path, None] = {}
    waiting = [_path(module)]
    while waiting:
        path = waiting.pop()
        if path is not None and path not in found:
            found[path] = None
            waiting += [_path(name) for name in sorted(_imports(path))]
    return list(found)


_digest = cache(digest_file)


@cache
def _path(module: str) -> Path | None:
    """The file of a module of this package; None of anything else."""
    first, *parts = module.split(".")
    place = ROOT.joinpath(*parts)
    if first != "sqft" or not parts:
        return None
    files = (place.with_suffix(".py"), place / "__init__.py")
    return next((file for file in files if file.is_file()), None)


@cache
def _imports(path: Path) -> frozenset[str]:
    """The modules that the code of a file imports, those for types only left out."""
    names: set[str] = set()
    for node in _running(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {_origin(node.module, alias.name) for alias in node.names}
    return frozenset(names)


def _running(tree: ast.AST) -> list[ast.AST]:
    """Every node of a file that can run."""
    nodes, waiting = [], [tree]
    while waiting:
        node = waiting.pop()
        nodes.append(node)
        for_types = isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        waiting += [] if for_types else list(ast.iter_child_nodes(node))
    return nodes


def _origin(module: str, name: str) -> str:
    """The module that `from module import name` takes the name from."""
    if _path(f"{module}.{name}") is not None:
        return f"{module}.{name}"
    path = _path(module)
    if path is None or path.name != "__init__.py":
        return module
    tree = ast.parse(path.read_text(encoding="utf-8"))
    places = names_for_types(tree)
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module:
            places |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
    return _origin(*places[name]) if name in places else module
