"""`sqft status`."""

from pathlib import Path
from typing import Annotated

import typer

from sqft.cli.options import AsJson, print_json

__all__ = ["status"]


def status(
    workspace: Annotated[
        Path, typer.Argument(help="A workspace, as in the recipe's runtime section.")
    ] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """List what a workspace holds: stages, and results."""
    from sqft.cli.tables import print_table
    from sqft.errors import WorkspaceError
    from sqft.pipeline import workspace_status
    from sqft.report import read_report
    from sqft.report.summary import format_bytes, format_seconds

    if not workspace.is_dir():
        raise WorkspaceError(f"there is no workspace {workspace}; run a recipe first, or name another folder")
    stages = workspace_status(workspace)
    if as_json:
        results = {path.parent.name: read_report(path.parent) for path in workspace.glob("*/report.json")}
        print_json({"stages": stages, "results": results})
        return
    rows = [
        [
            stage.name,
            "finished" if stage.finished else "begun",
            format_bytes(stage.size_bytes),
            format_seconds(stage.elapsed_seconds) if stage.finished else "-",
            stage.directory.name,
        ]
        for stage in stages
    ]
    if rows:
        print_table(["stage", "state", "disk", "time", "directory"], rows, left=2)
    reports = sorted([*workspace.glob("*/report.json"), *workspace.glob("*/*/report.json")])
    for path in reports:
        data = read_report(path.parent)
        certificate = {None: "no certificate", True: "certificate passed", False: "certificate FAILED"}
        print(f"results: {path.parent}  ({certificate[data.passed]})")
    if not rows and not reports:
        print(f"{workspace} is empty")
