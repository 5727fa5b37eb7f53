"""`sqft reproduce`."""

import json
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

__all__ = ["reproduce"]


def reproduce(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="gsm8k, math, commonsense, ...; small: mawps, science, math."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change.")
    ] = None,
    scale: Annotated[str, typer.Option(help="full, or small: SmolLM2-135M on two cores.")] = "full",
    data: Annotated[Path, typer.Option(help="The folder of the data sets.")] = Path("data"),
    only: Annotated[
        list[str] | None, typer.Option(help="Runs by name, * for anything; several times.")
    ] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Say what it would do, and stop.")] = False,
    only_table: Annotated[
        bool, typer.Option("--table", help="Run nothing; the table of what is there.")
    ] = False,
) -> None:
    """Run one of the paper's experiments, and show what was published beside it.

    Started again it goes on. What was not run, or not published, is shown as such.
    """
    from sqft.cli.sweep import print_plan, sweep_with_progress
    from sqft.directories import write_files
    from sqft.errors import RecipeError
    from sqft.pipeline.reproduction import experiment_table, load_experiment
    from sqft.pipeline.sweep import choose_cells
    from sqft.pipeline.sweep_run import plan_sweep
    from sqft.report.comparison import markdown_table

    if scale not in ("full", "small"):
        raise RecipeError(f"--scale is full or small, not {scale}")
    kind = cast(Literal["full", "small"], scale)
    found = load_experiment(name, kind, data, overrides)
    chosen = choose_cells(found, only)
    directory = Path(found.cells[0].recipe.runtime.workspace) / found.name
    failed = False
    if only_plan or not only_table:
        print_plan(plan_sweep(chosen))
        if only_plan:
            for cell in chosen.cells:
                print(f"  {cell.name}")
            return
        result = sweep_with_progress(chosen)
        failed = bool(result.failed)
    table = experiment_table(name, kind, found, directory)
    text = markdown_table(table)
    print(text)
    if directory.is_dir():
        rows = {"experiment": name, "scale": scale, "table": table}
        files = {"table.md": text + "\n", "table.json": json.dumps(rows, indent=1, ensure_ascii=False) + "\n"}
        written = write_files(directory, {file: content.encode() for file, content in files.items()})
        print(f"written: {', '.join(map(str, written))}")
    if failed:
        raise typer.Exit(1)
