"""`sqft compress`."""

from typing import Annotated

import typer

__all__ = ["compress"]


def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A directory, a GGUF file, or a hub id.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="SECTION.KEY=VALUE...", help="sparsify, quantize, calibration, evaluate, ..."),
    ] = None,
    name: Annotated[str, typer.Option(help="Folder of the results in the workspace.")] = "compressed",
) -> None:
    """Make a model sparse, INT4 or both, without training: a recipe of these sections alone.

    For instance: sqft compress my-model sparsify.sparsity=0.5 quantize.bits=4 calibration.source=texts.txt
    """
    from sqft.cli.run import print_result, run_with_progress
    from sqft.errors import RecipeError
    from sqft.pipeline import parse_recipe

    recipe = parse_recipe({"name": name, "model": model}, settings, origin="sqft compress")
    if recipe.sparsify is None and recipe.quantize is None:
        raise RecipeError("say what to do, for instance sparsify.sparsity=0.5 or quantize.bits=4")
    print_result(run_with_progress(recipe))
