"""`sqft clean`."""

from pathlib import Path
from typing import Annotated

import typer

from sqft.cli.options import AsJson, print_json

__all__ = ["clean"]


def clean(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RECIPE]...", help="Recipes whose work stays; default: those found here."),
    ] = None,
    workspace: Annotated[Path, typer.Option(help="A workspace, as in the recipe's runtime section.")] = Path(
        "runs"
    ),
    yes: Annotated[bool, typer.Option("--yes", help="Remove it; without this it is only shown.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what of a workspace nothing uses, and remove it with --yes.

    That is work begun and left, stages that no recipe here uses and no report in the workspace names, and
    converted models that no recipe here uses. Recipes are looked for below this folder, and where the results
    in the workspace came from. Results stay, and so does everything that is not as sqft wrote it.
    """
    from sqft.cli.tables import print_table
    from sqft.pipeline.cleaning import find_removable, remove
    from sqft.report.summary import format_bytes

    found = find_removable(workspace, recipes or None)
    gone = remove(found, workspace) if yes else []
    if as_json:
        print_json({"found": found, "removed": gone})
        return
    shown = gone if yes else found.removable
    rows = [
        [item.directory.relative_to(workspace).as_posix(), format_bytes(item.frees_bytes), item.reason]
        for item in shown
    ]
    if rows:
        print_table(["directory", "frees", "why"], rows, left=1)
    kept = "1 recipe" if len(found.recipes) == 1 else f"{len(found.recipes)} recipes"
    print(f"work of {kept} is kept: {', '.join(path.name for path in found.recipes)}")
    for path, reason in found.unread.items():
        print(f"stages and models stay, as {path} cannot be followed: {reason}; mend it, or name the others")
    for directory, reason in found.kept.items():
        print(f"stays: {directory} {reason}")
    total = format_bytes(sum(item.frees_bytes for item in shown))
    if yes:
        print(f"removed {len(gone)} directories, {total} are free")
    else:
        print(f"{len(shown)} directories, {total}" + ("; sqft clean --yes removes them" if shown else ""))
