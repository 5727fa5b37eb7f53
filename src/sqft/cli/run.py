"""`sqft run`."""

import shlex
from typing import TYPE_CHECKING

from sqft.cli.options import AsJson, Overrides, RecipePath, print_json

if TYPE_CHECKING:
    from sqft.pipeline import Recipe, RunResult
    from sqft.pipeline.team import Team

__all__ = ["print_result", "print_usage", "run", "run_with_progress"]


def run(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Run a recipe: every stage that is not there yet, then the report.

    On several GPUs: torchrun --nproc-per-node 4 -m sqft run recipe.yaml. They train together; the first
    process does the rest.
    """
    from sqft.launch import launched_processes
    from sqft.pipeline import load_recipe
    from sqft.pipeline.run import resolve_device
    from sqft.pipeline.team import open_team

    loaded = load_recipe(recipe, overrides)
    team = open_team(resolve_device(loaded.runtime.device)) if launched_processes() > 1 else None
    if team is not None and not team.is_first:
        team.assist()
        return
    result = run_with_progress(loaded, team)
    if team is not None:
        team.end()
    if as_json:
        print_json(result)
    else:
        print_result(result)


def run_with_progress(recipe: "Recipe", team: "Team | None" = None) -> "RunResult":
    """Run a recipe with bars on the terminal. team: as `run_recipe` takes it."""
    from sqft.cli.messages import RichProgress, verbosity
    from sqft.pipeline import run_recipe

    if verbosity.get() > 0:
        runtime = recipe.runtime.model_copy(update={"log_level": "info"})
        recipe = recipe.model_copy(update={"runtime": runtime})
    with RichProgress() as progress:
        return run_recipe(recipe, team=team, progress=progress)


def print_result(result: "RunResult") -> None:
    """The table of models, the certificate, and where things are."""
    from sqft.cli.tables import print_table
    from sqft.report import summary_table

    data = result.data
    if data.models:
        header, *rows = summary_table(data)
        print_table(header, rows)
    if data.checks is not None:
        passed = sum(check.passed for check in data.checks)
        print(f"certificate: {'passed' if data.passed else 'FAILED'} ({passed} of {len(data.checks)} checks)")
    print(f"report:      {result.report_html}")
    if result.model_dir is not None:
        print(f"model:       {result.model_dir}")
    if result.adapter_dir is not None:
        print(f"adapter:     {result.adapter_dir}")
    print_usage(result)


def print_usage(result: "RunResult") -> None:
    """What to type next: open the model, and prove again that it is the one that was trained."""
    from sqft.runtimes.commands import opening_code

    merged = result.data.checks is not None
    model = result.model_dir or result.base_dir
    if model is None:
        return
    print()
    for place, line in enumerate(opening_code(model, None if merged else result.adapter_dir)):
        print(f"{'' if place else 'use it:':<12} {line}")
    if merged:
        words = ["sqft", "verify", str(model), "--base", str(result.base_dir)]
        print(f"verify it:   {shlex.join([*words, '--adapter', str(result.adapter_dir)])}")
