"""A first recipe, written for a model, data, a goal and a runtime after a look at all of them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from sqft.errors import DataError, RecipeError
from sqft.pipeline.plan import Plan, plan_recipe
from sqft.pipeline.recipe_file import parse_recipe
from sqft.sections import DataSection, ModelSection

if TYPE_CHECKING:
    from sqft.models import ModelOutline

__all__ = ["GOALS", "RUNTIMES", "Draft", "draft_recipe"]

Goal = Literal["smallest", "cpu", "quality"]
Runtime = Literal["transformers", "llama.cpp", "vllm", "openvino"]
GOALS: tuple[Goal, ...] = get_args(Goal)
RUNTIMES: tuple[Runtime, ...] = get_args(Runtime)
LONGEST = 4096  # tokens of an item that is looked at
SEQUENCE = 256  # tokens of a calibration sequence
SPARSIFY = {
    "smallest": (
        "# Half of the weights become zero; sqft pack stores only what is kept.",
        {"method": "wanda", "sparsity": 0.5},
    ),
    "cpu": (
        "# Half of the weights become zero, in the pattern that our CPU kernels decode fastest.",
        {"sparsity": 0.5, "target": "cpu"},
    ),
}
EXPORTS = {"llama.cpp": "gguf", "vllm": "compressed-tensors", "openvino": "openvino"}
TARGETS = {"llama.cpp": "gguf-q4_0", "openvino": "openvino"}


@dataclass(frozen=True)
class Draft:
    """A recipe as text, which `sqft plan` accepts, and its plan."""

    text: str
    plan: Plan


def draft_recipe(
    model: str,
    data: str,
    goal: str,
    runtime: str,
    *,
    prompt: str | None = None,
    answer: str | None = None,
    name: str = "recipe",
) -> Draft:
    """Write a recipe with comments for a model and a file of training items.

    goal: smallest, cpu (fastest there) or quality; runtime: transformers, llama.cpp, vllm or openvino. The
    length of sequences and the calibration follow from the data, the size of groups from the model's widths,
    and memory is saved where training would not fit into this machine's.

    Raises: RecipeError for an unknown goal or runtime; what `plan_recipe` raises.
    """
    from sqft.models import model_outline

    for given, known, what in ((goal, GOALS, "goal"), (runtime, RUNTIMES, "runtime")):
        if given not in known:
            raise RecipeError(f"{what} {given!r} is unknown; choose from {', '.join(known)}")
    section = ModelSection(source=model)
    items = {"train": data, "prompt": prompt, "answer": answer}
    values: dict[str, Any] = {
        "name": name,
        "model": model,
        "data": {key: value for key, value in items.items() if value is not None},
    }
    remarks = _look_at_data(values, section)
    values |= _compression(goal, runtime, model_outline(section))
    values["adapters"] = {"method": "scales"}
    values["train"] = {"epochs": 3, "batch_size": 8, "eval_steps": 50}
    values["evaluate"] = {"models": ["base", "quantized", "merged"]} if remarks["test"] else None
    values = {key: value for key, value in values.items() if value is not None}
    planned = plan_recipe(parse_recipe(values))
    available = _available_memory()
    if available is not None and max(stage.memory_bytes for stage in planned.stages) > available:
        values["train"] |= {"gradient_checkpointing": True, "gradient_accumulation": 8}
        planned = plan_recipe(parse_recipe(values))
    return Draft(_write(values, goal, runtime, remarks), planned)


def _look_at_data(values: dict[str, Any], model: ModelSection) -> dict[str, Any]:
    """Set what follows from the data, and return what is told of it."""
    from sqft.data import load_splits
    from sqft.models.source import source_tokenizer

    section = DataSection.model_validate(values["data"] | {"sequence_length": LONGEST})
    splits = load_splits(section, source_tokenizer(model, Path("runs") / "models"), seed=0)
    if not splits.train:
        raise DataError(f"{values['data']['train']} holds no item of at most {LONGEST} tokens")
    lengths = splits.report["lengths"]["train"]
    longest, tokens = int(lengths["longest"]), int(lengths["tokens"])
    values["data"]["sequence_length"] = -(-longest // 32) * 32
    length = max(1, min(SEQUENCE, tokens // 8))
    values["calibration"] = {"num_samples": min(64, max(1, tokens // length)), "sequence_length": length}
    return {
        "form": splits.report["forms"]["train"],
        "train": len(splits.train),
        "test": len(splits.test),
        "longest": longest,
    }


def _compression(goal: str, runtime: str, outline: "ModelOutline") -> dict[str, Any]:
    widths = {columns for _, columns in outline.linears.values()}
    size = next((n for n in (128, 64, 32) if all(width % n == 0 for width in widths)), -1)
    target = TARGETS.get(runtime)
    quantize: dict[str, Any] = {"method": "gptq", "bits": 4}
    quantize |= {"target": target} if target == "gguf-q4_0" else {"group_size": size}
    if goal == "quality":
        quantize |= {"scale_search": True, "descent": 2, "scale_fit": True}
    export = {"formats": [EXPORTS[runtime]]} if runtime in EXPORTS else None
    sparsify = SPARSIFY[goal][1] if goal in SPARSIFY else None
    return {"sparsify": sparsify, "quantize": quantize, "export": export}


def _write(values: dict[str, Any], goal: str, runtime: str, remarks: dict[str, Any]) -> str:
    """The recipe with its comments."""
    test = (
        f"{remarks['test']} are held out for the test" if remarks["test"] else "none is held out for a test"
    )
    comments = {
        "model": [f"# Goal: {goal}; to run in {runtime}. Every setting: docs/recipe.md, or sqft schema."],
        "data": [
            f"# {remarks['train']} items to train on, read as {remarks['form']}; {test}.",
            f"# The longest has {remarks['longest']} tokens. sqft preview shows them as the model sees them.",
        ],
        "calibration": ["# Training texts that compression looks at."],
        "sparsify": [SPARSIFY[goal][0]] if goal in SPARSIFY else [],
        "quantize": ["# Integers of 4 bits, with one scale for each group of weights."],
        "adapters": [
            "# Trains the scales and the norms: exact in the merged model, no byte and no time more."
        ],
        "train": [
            "# The loss on held-out items is measured every eval_steps; early_stopping: 3 ends in time."
        ],
        "evaluate": ["# What is measured on the test items, the model as it came beside."],
        "export": ["# Written beside the merged model, opened in its runtime, and compared code by code."],
    }
    lines: list[str] = []
    for key in comments:
        value = values.get(key)
        if value is None:
            continue
        lines += [*([""] if lines else []), *comments[key]]
        if isinstance(value, dict):
            lines += [f"{key}:", *(f"  {inner}: {_yaml(setting)}" for inner, setting in value.items())]
        else:
            lines.append(f"{key}: {_yaml(value)}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    """A value in YAML; JSON is YAML, but plain words read better without quotes."""
    if isinstance(value, str) and value.replace("-", "").replace("_", "").isalnum() and value[0].isalpha():
        return value
    if isinstance(value, list):
        return f"[{', '.join(map(_yaml, value))}]"
    return json.dumps(value, ensure_ascii=False)


def _available_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
