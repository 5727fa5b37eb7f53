"""`sqft demo`."""

from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["SIZES", "demo", "demo_values"]

# What each size changes in demo.yaml, and how many items it uses.
SIZES: dict[str, tuple[dict[str, dict[str, Any]], dict[str, int]]] = {
    "demo": ({}, {}),
    "demo-small": (
        {
            "train": {"max_steps": 20, "warmup_steps": 2},
        },
        {"train_items": 400, "search_items": 16, "test_items": 48},
    ),
    # The same data and steps, so that every stage of the demo is shared, and what the reference needs.
    "demo-full": (
        {
            "evaluate": {"models": ["base", "dense_tuned", "sparse", "quantized", "merged"]},
            "adapters": {"ranks": [16], "alpha": 32},
            "train": {"learning_rate": 3.0e-3},
        },
        {},
    ),
}


def demo(
    small: Annotated[bool, typer.Option("--small", help="What CI runs; its figures mean little.")] = False,
    full: Annotated[
        bool, typer.Option("--full", help="The demo and the dense model tuned as it is: the reference.")
    ] = False,
    workspace: Annotated[Path, typer.Option(help="The folder to work in.")] = Path("runs"),
) -> None:
    """Run the whole pipeline on SmolLM2-135M, without a network.

    The results are in WORKSPACE/demo, or demo-small or demo-full.
    """
    from sqft.cli.run import print_result, run_with_progress
    from sqft.data.generated import write_demo_data
    from sqft.errors import RecipeError
    from sqft.pipeline import parse_recipe

    if small and full:
        raise RecipeError("give --small or --full, not both")
    name = "demo-small" if small else "demo-full" if full else "demo"
    values = demo_values(name)
    values["data"] = write_demo_data(workspace / f"{name}-data", **SIZES[name][1])
    values["runtime"] = {"workspace": str(workspace)}
    # The recipe counts as a file in the workspace, so that the demo may replace results of its earlier runs.
    print_result(run_with_progress(parse_recipe(values, origin=name, path=workspace / f"{name}.yaml")))


def demo_values(name: str) -> dict[str, Any]:
    """The demo's recipe at one of its sizes, without its data section."""
    import yaml

    values: dict[str, Any] = yaml.safe_load(files("sqft.cli").joinpath("demo.yaml").read_text("utf-8"))
    for section, changes in SIZES[name][0].items():
        values[section] = values.get(section, {}) | changes
    return values | {"name": name}
