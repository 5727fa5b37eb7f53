"""`sqft evaluate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sqft.cli.options import AsJson, print_json

if TYPE_CHECKING:
    from sqft.pipeline.evaluation import Evaluation
    from sqft.sections import EvaluateSection

__all__ = ["evaluate"]


def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...",
            help="Model directories, adapters, GGUF files, OpenVINO models or hub ids.",
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help="Items to answer: loss and accuracy. Rendered as in training.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Format string over a record; default: as the model was trained.")
    ] = None,
    answer: Annotated[str | None, typer.Option(help="The same for the answer.")] = None,
    choices: Annotated[str | None, typer.Option(help="Field with a list of choices.")] = None,
    label: Annotated[str | None, typer.Option(help="Field with the index of the right one.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Take prompt, test file and evaluate section from this recipe.")
    ] = None,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Tasks of lm-evaluation-harness, by name or YAML file; commas or several times."),
    ] = None,
    tasks_data: Annotated[
        Path | None, typer.Option(help="A folder with NAME/test.jsonl of each task, in place of the hub.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Solved examples before each item.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompts of tasks through the chat template.")
    ] = False,
    general: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Loss on a general text: a file, or package for the one of sqft.",
        ),
    ] = None,
    perplexity: Annotated[Path | None, typer.Option(help="A text file.")] = None,
    max_items: Annotated[int | None, typer.Option(min=1, help="The first so many items.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer; default 64.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Default 16.")] = None,
    samples: Annotated[bool, typer.Option("--samples", help="Keep prompts and answers of tasks.")] = False,
    base: Annotated[str | None, typer.Option(help="Of an adapter, where it is not what it names.")] = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Of a GGUF file; default its own.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, ...")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1)] = None,
    as_json: AsJson = False,
    write: Annotated[
        bool, typer.Option("--write/--no-write", help="Put the results beside the model, in .eval_results.")
    ] = True,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code of the model or of task files.")
    ] = False,
) -> None:
    """Measure finished models: answer loss, accuracy, perplexity, and tasks of lm-evaluation-harness.

    For instance: sqft evaluate runs/mine/merged --data test.jsonl --tasks arc_easy,gsm8k
    """
    from dataclasses import asdict

    import torch

    if threads:
        torch.set_num_threads(threads)
    asked = {
        "batch_size": batch_size,
        "max_items": max_items,
        "max_new_tokens": max_new_tokens,
        "num_fewshot": num_fewshot,
        "tasks": [name for text in tasks for name in text.split(",") if name] if tasks else None,
        "tasks_data": str(tasks_data) if tasks_data else None,
        "general_text": general,
        "perplexity": str(perplexity) if perplexity else None,
    }
    form = {"prompt": prompt, "answer": answer, "choices": choices, "label": label}
    section, items = _sections(recipe, asked, form, data)
    found = _evaluate_all(
        models,
        section,
        items,
        device,
        base=base,
        tokenizer_dir=tokenizer,
        chat_tasks=chat,
        samples=samples,
        write=write,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print_json([{"model": m, **asdict(one.row)} for m, one in zip(models, found, strict=True)])
    else:
        _print_results(found, models)


def _evaluate_all(
    models: list[str],
    section: "EvaluateSection",
    items: dict[str, Any] | None,
    device: str,
    **options: Any,
) -> "list[Evaluation]":
    """Every model in turn, with one bar for all. options: of `evaluate_path`."""
    from sqft.cli.messages import RichProgress
    from sqft.pipeline.evaluation import evaluate_path
    from sqft.pipeline.run import resolve_device

    options["device"] = resolve_device(device)
    with RichProgress() as progress:
        return [evaluate_path(model, section, items, progress=progress, **options) for model in models]


def _sections(
    recipe: Path | None, asked: dict[str, Any], form: dict[str, Any], data: Path | None
) -> "tuple[EvaluateSection, dict[str, Any] | None]":
    """The evaluate section, and the keys of a data section; what was asked for goes before the recipe's.

    Raises: RecipeError for what fits no section.
    """
    from pydantic import ValidationError

    from sqft.errors import RecipeError
    from sqft.pipeline import load_recipe
    from sqft.sections import EvaluateSection

    values: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
    items = {key: value for key, value in form.items() if value is not None}
    if recipe is not None:
        told = load_recipe(recipe)
        if told.evaluate is not None:
            values = told.evaluate.model_dump(exclude={"models"}, exclude_none=True) | values
        if told.data is not None:
            items = told.data.model_dump(exclude_none=True) | items
    values.setdefault("general_text", None)  # takes seconds, and is not always asked for
    if data is not None:
        items["test"] = str(data)
    if items and "test" not in items:
        raise RecipeError("name the file of items with --data")
    try:
        return EvaluateSection.model_validate(values), items or None
    except ValidationError as error:
        raise RecipeError(str(error.errors()[0]["msg"]).removeprefix("Value error, ")) from None


def _print_results(found: "list[Evaluation]", models: list[str]) -> None:
    """The table, then figures of tasks. models: as they were named, where their folders are called alike."""
    from sqft.cli.tables import print_table
    from sqft.report.summary import models_table

    names = [one.name for one in found]
    names = names if len(set(names)) == len(names) else models
    header, *rows = models_table([one.row for one in found], found[0].loss_unit)
    print_table(header, [[name, *row[1:]] for name, row in zip(names, rows, strict=True)])
    for name, one in zip(names, found, strict=True):
        for task, figures in one.items.get("tasks", {}).items():
            for key, value in figures.items():
                metric, comma, kind = key.partition(",")
                error = figures.get(f"{metric}_stderr,{kind}")
                if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                    continue
                spread = f" ± {error:.4f}" if isinstance(error, float) else ""
                shown = metric if kind == "none" else f"{metric} ({kind})"
                print(f"{name}  {task}  {shown}: {value:.4f}{spread} (standard error)")
        for path in one.written:
            print(f"written: {path}")
