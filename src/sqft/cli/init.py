"""`sqft init`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

__all__ = ["init"]


def init(
    recipe: Annotated[Path, typer.Argument(metavar="[RECIPE]", help="The file to write.")] = Path(
        "recipe.yaml"
    ),
    model: Annotated[
        str | None, typer.Option(help="A directory with safetensors, a GGUF file, or a hub id.")
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Training items: a file, a pattern, or hub:NAME[:CONFIG[:SPLIT]].")
    ] = None,
    goal: Annotated[
        str | None, typer.Option(help="smallest, cpu (fastest on a CPU), or quality; default smallest.")
    ] = None,
    runtime: Annotated[
        str | None,
        typer.Option("--for", help="transformers, llama.cpp, vllm or openvino; default transformers."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Format string over an item's fields, for data of no known form.")
    ] = None,
    answer: Annotated[str | None, typer.Option(help="Format string over an item's fields.")] = None,
) -> None:
    """Write a first recipe for your model and data, with comments; asks for what is not given."""
    from sqft.cli.plan import print_stages
    from sqft.errors import RecipeError
    from sqft.pipeline.draft import GOALS, RUNTIMES, draft_recipe

    if recipe.exists():
        raise RecipeError(f"{recipe} is there already; name another file")
    if not recipe.absolute().parent.is_dir():
        raise RecipeError(f"there is no folder {recipe.parent}; make it first")
    model = model or _ask("model", "Model (a directory, a .gguf file, or a hub id)")
    data = data or _ask("data", "Training items (a file, or hub:NAME)")
    goal = goal or _ask("goal", f"Goal ({', '.join(GOALS)})", GOALS[0])
    runtime = runtime or _ask("for", f"To run in ({', '.join(RUNTIMES)})", RUNTIMES[0])
    draft = draft_recipe(model, data, goal, runtime, prompt=prompt, answer=answer, name=recipe.stem)
    recipe.write_text(draft.text, encoding="utf-8")
    print(draft.text)
    print_stages(draft.plan)
    print(f"\nwritten: {recipe}; run it with: sqft run {recipe}")


def _ask(option: str, question: str, default: str | None = None) -> str:
    """Ask on a terminal; elsewhere take the default. Raises: RecipeError where there is none."""
    from sqft.errors import RecipeError

    if sys.stdin.isatty():
        return str(typer.prompt(question, default=default))
    if default is None:
        raise RecipeError(f"give --{option}: {question[0].lower()}{question[1:]}")
    return default
