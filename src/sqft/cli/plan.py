"""`sqft plan`."""

from pathlib import Path
from typing import TYPE_CHECKING

from sqft.cli.options import AsJson, Overrides, RecipePath, print_json

if TYPE_CHECKING:
    from sqft.pipeline import Plan

__all__ = ["plan", "print_stages"]


def plan(recipe: RecipePath, overrides: Overrides = None, as_json: AsJson = False) -> None:
    """Show what a recipe would do, before any weight is loaded; refuse what a run would refuse."""
    from sqft.cli.preview import print_data
    from sqft.cli.tables import print_table
    from sqft.pipeline import load_recipe, plan_recipe

    loaded = load_recipe(recipe, overrides)
    planned = plan_recipe(loaded)
    if as_json:
        print_json(planned)
        return
    print(f"{planned.name}: {planned.model}, {planned.num_parameters / 1e6:.1f} M parameters\n")
    print_stages(planned)
    ranks = ", ".join(map(str, loaded.adapters.ranks)) if loaded.adapters else ""
    tunes = any(module.tuned_rank for module in planned.modules)
    modules = [
        [
            module.name,
            f"{module.shape[0]} x {module.shape[1]}",
            str(module.count),
            "yes" if module.sparsified else "-",
            "yes" if module.quantized else "-",
            ranks if module.rank else "-",
            str(module.num_scales) if module.num_scales else "-",
            *([str(module.tuned_rank) if module.tuned_rank else "-"] if tunes else []),
        ]
        for module in planned.modules
    ]
    print()
    header = ["linear", "shape", "count", "mask", "quantized", "adapter rank", "trained scales"]
    print_table([*header, *(["tune rank"] if tunes else [])], modules)
    if planned.data is not None:
        print()
        print_data(planned.data)
    if not planned.has_weights:
        print(f"\n{planned.model} has a config and no weights: a run needs them")
        if loaded.data and planned.data is None:
            print("its tokenizer is not at hand, so the data is not opened")
    print("\nMemory and disk are estimates from shapes; Python and its libraries take about 0.5 GB more.")
    print(_time_needed(planned))


def print_stages(planned: "Plan") -> None:
    """The table of stages: what is there already, and what each would take."""
    from sqft.cli.tables import print_table
    from sqft.report.summary import format_bytes, format_seconds

    stages = [
        [
            stage.name,
            "reused" if stage.reused else "resumed" if stage.resumed else "runs",
            format_bytes(stage.memory_bytes),
            format_bytes(stage.disk_bytes),
            "-" if stage.seconds is None else format_seconds(stage.seconds),
            Path(stage.directory).name if stage.directory else "-",
        ]
        for stage in planned.stages
    ]
    print_table(["stage", "state", "peak memory", "disk", "time", "directory"], stages, left=2)


def _time_needed(planned: "Plan") -> str:
    """How long the run takes, as far as that is known."""
    from sqft.report.summary import format_seconds

    waiting = [stage for stage in planned.stages if not stage.reused]
    known = [stage.seconds for stage in waiting if stage.seconds is not None]
    unknown = [stage.name for stage in waiting if stage.seconds is None]
    if not waiting:
        return "Everything is there: a run has only its report to write."
    if not known:
        return "Time is not known: it is estimated on processors alone, and where the data can be opened."
    beside = f", {', '.join(unknown)} not counted" if unknown else ""
    return (
        f"Time: about {format_seconds(sum(known))} in all{beside}, on this machine when nothing else "
        "runs; half or twice as much is possible."
    )
