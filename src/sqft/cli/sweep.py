"""`sqft sweep`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from sqft.pipeline.sweep import Sweep
    from sqft.pipeline.sweep_run import SweepPlan, SweepResult

__all__ = ["print_plan", "sweep", "sweep_with_progress"]


def sweep(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe with lists.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[SECTION.KEY=VALUE]...", help="Settings to change; a list makes an axis."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Also more than 100 runs.")] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="Runs by name, * for anything; several times.")
    ] = None,
    only_plan: Annotated[bool, typer.Option("--plan", help="Say what it would do, and stop.")] = False,
) -> None:
    """Run a recipe with lists, one run for each combination; what they share is done once.

    For instance: sqft sweep recipe.yaml sparsify.sparsity=[0.3,0.5,0.7] train.seed=[0,1,2]
    Started again it goes on; started several times at once, the processes share the work. Exits with 1 if a
    run failed.
    """
    from sqft.pipeline.sweep import choose_cells, load_sweep
    from sqft.pipeline.sweep_run import plan_sweep

    found = choose_cells(load_sweep(recipe, overrides, many=yes), only)
    print_plan(plan_sweep(found))
    if only_plan:
        for cell in found.cells:
            print(f"  {cell.name}")
        return
    result = sweep_with_progress(found)
    _print_result(result)
    if result.failed:
        raise typer.Exit(1)


def print_plan(plan: "SweepPlan") -> None:
    """What a sweep will do, in two lines."""
    from sqft.report.summary import format_seconds

    shared = plan.wanted - plan.distinct
    print(
        f"{plan.name}: {plan.num_cells} runs of {plan.wanted} stages; {shared} are shared, {plan.done} are "
        f"there, {plan.to_run} to run"
    )
    if plan.to_run and plan.seconds:
        rest = f"; not known of {', '.join(plan.unknown)}, none of which is finished" if plan.unknown else ""
        print(f"time: {format_seconds(plan.seconds)} by finished stages of the same kinds{rest}")
    elif plan.to_run:
        print("time: not known, since this workspace has no finished stage of these kinds")


def sweep_with_progress(found: "Sweep") -> "SweepResult":
    """Run a sweep with bars on the terminal and a line for each run."""
    from sqft.cli.messages import RichProgress
    from sqft.pipeline.sweep_run import run_sweep

    with RichProgress() as progress:
        return run_sweep(found, tell=lambda line: print(line, flush=True), progress=progress)


def _print_result(result: "SweepResult") -> None:
    from sqft.cli.tables import print_table
    from sqft.errors import SqftError
    from sqft.pipeline.comparison import compare_runs
    from sqft.report.comparison import compare_table
    from sqft.report.page import write_comparison

    print(f"done: {len(result.done)}, failed: {len(result.failed)}")
    for name, reason in result.failed.items():
        print(f"  {name}: {reason}")
    try:
        data = compare_runs([str(directory) for directory in result.done.values()])
    except SqftError as error:
        print(f"no comparison: {error}")
    else:
        header, *rows = compare_table(data)
        print_table(header, rows)
        print(f"page: {write_comparison(data, result.directory)}")
    print(f"results: {result.directory}")
