"""What of a workspace can be removed: work that nothing here uses, and that is provably ours."""

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft.directories import PARTIAL, is_being_built, remove_own, why_not_ours
from sqft.errors import SqftError, WorkspaceError
from sqft.marks import Mark, is_directory, read_mark
from sqft.pipeline.locks import StageBusyError, hold, holders
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.recipe_file import RECIPE_BYTES
from sqft.pipeline.runner import Workspace, stage_keys
from sqft.pipeline.stages import recipe_stages
from sqft.pipeline.sweep import load_sweep
from sqft.untrusted import parse_yaml, read_bounded

__all__ = ["Cleaning", "Removable", "find_removable", "remove"]

RECIPE_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True)
class Removable:
    """A directory that can be removed, why, and the bytes that this frees: those not linked elsewhere."""

    directory: Path
    reason: str
    frees_bytes: int


@dataclass(frozen=True)
class Cleaning:
    """What a workspace can do without. recipes: whose work is kept, beside that of every report in it.

    kept: directories that nothing uses and that stay, and why. unread: recipes that could not be followed;
    where there are any, no finished stage and no converted model is removable.
    """

    removable: list[Removable]
    recipes: list[Path]
    kept: dict[Path, str] = field(default_factory=dict)
    unread: dict[Path, str] = field(default_factory=dict)


@dataclass
class _Use:
    """What recipes and reports use: stage directories by name, those that are begun, and converted models."""

    finished: set[str] = field(default_factory=set)
    resumed: set[str] = field(default_factory=set)
    models: set[str] = field(default_factory=set)


def find_removable(root: Path, recipes: Sequence[Path] | None = None, *, beside: Path = Path()) -> Cleaning:
    """Look through a workspace, and change nothing.

    recipes: whose stages are used; default: every recipe below the folder `beside` with this workspace, and
    those that the workspace's results came from. What a report in the workspace names is used too.

    Raises: WorkspaceError if there is no workspace; RecipeError if a recipe that is given is none.
    """
    if not root.is_dir():
        raise WorkspaceError(f"there is no workspace {root}; name the folder that runtime.workspace names")
    workspace, use = Workspace(root), _Use()
    unread: dict[Path, str] = {}
    followed = []
    for path in _recipes_around(root, beside) if recipes is None else recipes:
        try:
            cells = [cell.recipe for cell in load_sweep(path, many=True).cells]
            if recipes is not None or any(_is_at(recipe, root) for recipe in cells):
                for recipe in cells:
                    _note_use(recipe, workspace, use)
                followed.append(path)
        except SqftError as error:
            if recipes is not None:
                raise
            unread[path] = str(error)
    use.finished |= _stages_of_reports(root)
    found = Cleaning([], followed, unread=unread)
    busy = next(iter(holders(workspace.locks)), None)
    for directory in sorted(_own_places(workspace)):
        reason = _why_removable(directory, workspace, use, surely=not unread)
        if reason is None:
            continue
        against = why_not_ours(directory)
        if against is None and busy is not None:
            against = f"is left alone while {busy} is at work here"
        if against is None and is_being_built(directory):
            against = "is being built"
        if against is None:
            found.removable.append(Removable(directory, reason, _freed(directory)))
        else:
            found.kept[directory] = against
    return found


def remove(found: Cleaning, root: Path) -> list[Removable]:
    """Remove what was found; returns what of it is gone. What changed or is used meanwhile stays."""
    workspace, gone = Workspace(root), []
    if next(iter(holders(workspace.locks)), None) is not None:
        return []
    for item in found.removable:
        name = item.directory.name.split(PARTIAL)[0]
        with suppress(StageBusyError), hold(workspace.lock(name), name, wait=False):
            if remove_own(item.directory):
                gone.append(item)
    return gone


def _own_places(workspace: Workspace) -> Iterator[Path]:
    """Stages, converted models, and what was begun in these folders and in those of results."""
    for folder in (workspace.stages, workspace.models):
        yield from (path for path in folder.glob("*") if is_directory(path))
    for pattern in (f"*/*{PARTIAL}*", f"*/*/*{PARTIAL}*"):
        for path in workspace.root.glob(pattern):
            if is_directory(path) and path.parent not in (workspace.stages, workspace.models):
                yield path


def _why_removable(directory: Path, workspace: Workspace, use: _Use, *, surely: bool) -> str | None:
    """None for what is used. surely: every recipe could be followed."""
    name, is_partial, _ = directory.name.partition(PARTIAL)
    if is_partial:
        if name in use.resumed or (not surely and directory.parent == workspace.stages):
            return None
        return "begun, and no run of a recipe here goes on with it"
    if not surely:
        return None
    if directory.parent == workspace.stages:
        return None if name in use.finished else "no recipe or report here uses it"
    return None if name in use.models else "converted, and no recipe here uses it"


def _recipes_around(root: Path, beside: Path) -> list[Path]:
    """Files that say they are a recipe: below a folder, and where the marks of results say."""
    found = {
        path.resolve() for path in _visible(beside) if path.suffix in RECIPE_SUFFIXES and _is_recipe(path)
    }
    for report in [*root.glob("*/report.json"), *root.glob("*/*/report.json")]:
        mark = read_mark(report.parent) or Mark()
        path = (root.resolve() / str(mark.about.get("recipe", "."))).resolve()
        found |= {path} if path.is_file() and _is_recipe(path) else set()
    return sorted(path for path in found if not path.is_relative_to(root.resolve()))


def _visible(folder: Path) -> Iterator[Path]:
    """Files below a folder, but for hidden folders and what is linked."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if is_directory(path):
            with suppress(OSError):
                yield from _visible(path)
        elif path.is_file():
            yield path


def _is_recipe(path: Path) -> bool:
    """Whether a file has a model, as every recipe has; one that is no YAML may be a recipe with a slip."""
    try:
        values = parse_yaml(read_bounded(path, RECIPE_BYTES).decode("utf-8"))
    except (OSError, ValueError):
        return b"\nmodel:" in b"\n" + path.read_bytes()[:RECIPE_BYTES] if path.is_file() else False
    return isinstance(values, dict) and "model" in values


def _is_at(recipe: Recipe, root: Path) -> bool:
    return Path(recipe.runtime.workspace).resolve() == root.resolve()


def _note_use(recipe: Recipe, workspace: Workspace, use: _Use) -> None:
    from sqft.models import model_identity
    from sqft.models.source import converted_directory

    keys = stage_keys(recipe, model_identity(recipe.model, workspace.digests))
    for stage in recipe_stages(recipe):
        name = workspace.stage_directory(stage.name, keys[stage.name]).name
        use.finished.add(name)
        use.resumed |= {name} if stage.resumes else set()
    converted = converted_directory(recipe.model, workspace.models)
    use.models |= {converted.name} if converted else set()


def _stages_of_reports(root: Path) -> set[str]:
    """The stages that reports in a workspace came from: their evidence, and the bases of their adapters."""
    found = set()
    for path in [*root.glob("*/report.json"), *root.glob("*/*/report.json")]:
        try:
            lineage: Any = json.loads(path.read_text(encoding="utf-8"))["lineage"]
            found |= {str(row["directory"]) for row in lineage}
        except (OSError, ValueError, LookupError, TypeError, RecursionError):
            raise WorkspaceError(f"{path} is damaged; move it away, so that nothing of it is lost") from None
    return found


def _freed(directory: Path) -> int:
    """Bytes of the files that have no other name, as published weights have."""
    stats = [path.lstat() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum(stat.st_size for stat in stats if stat.st_nlink == 1)
