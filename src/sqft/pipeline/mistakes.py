"""What to say of a recipe that is wrong: where, and what to write in its place."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from pydantic import BaseModel

from sqft.pipeline.keys import inner_sections, section_at

__all__ = ["describe_mistake", "of_one_kind"]

# What other tools call these.
ALIASES = {
    "compression": "sparsify",
    "dataset": "source",
    "early_stopping_patience": "early_stopping",
    "exclude_modules": "skip_modules",
    "gradient_accumulation_steps": "gradient_accumulation",
    "load_best_model_at_end": "keep",
    "lora": "adapters",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lr": "learning_rate",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "num_train_epochs": "epochs",
    "output_dir": "workspace",
    "peft": "adapters",
    "per_device_train_batch_size": "batch_size",
    "prune": "sparsify",
    "pruning": "sparsify",
    "quantization": "quantize",
    "r": "ranks",
    "rank": "ranks",
    "ratio": "sparsity",
    "save_steps": "checkpoint_steps",
    "seq_len": "sequence_length",
    "split": "train",
    "steps": "max_steps",
    "training": "train",
    "training_args": "train",
}
# Sections in which a key is looked for that its own section lacks, the likeliest first.
LIKELY = ("train", "data", "runtime")
BRANCH = re.compile(r"(list|dict|tuple|function-\w+)\[")  # how pydantic begins the name of a kind
# pydantic's words for a value of a wrong kind, and ours.
KINDS = {
    "int": "takes a whole number",
    "float": "takes a number",
    "bool": "takes true or false",
    "string": "takes a text",
    "dict": "takes keys and values: {key: value}",
}


def describe_mistake(model: type[BaseModel], item: Mapping[str, Any]) -> str:
    """One of pydantic's errors about a recipe, as a user should read it.

    model: the recipe's class, which names sections for keys that are unknown.
    """
    path = [str(part) for part in item["loc"] if not _is_branch(part)]
    place = ".".join(path)
    kind, given = str(item["type"]), item.get("input")
    if kind == "extra_forbidden":
        return f"{place}: unknown key{_hint(model, path)}"
    if kind == "missing":
        return f"{place}: is required; write it"
    if kind == "model_type":
        keys = ", ".join(list(getattr(section_at(model, path), "model_fields", {}))[:4])
        return f"{place}: takes a section with keys such as {keys}{_shown(given)}"
    if isinstance(given, list) and not kind.startswith(("list", "too_", "value_")):
        return f"{place}: takes one value, not a list; for a run with each of several, use sqft sweep"
    if kind == "list_type":
        return f"{place}: takes a list; write [{given}]"
    if kind == "too_short":
        return f"{place}: the list is empty; write at least one"
    if kind == "string_pattern_mismatch" and place == "name":
        return f"name: takes letters, digits, '.', '_', '-' and one slash at most{_shown(given)}"
    if path[-1:] == ["sparsity"] and isinstance(given, int | float) and 1 < given <= 100:
        return f"{place}: is a fraction; for {given:g} % write {given / 100:g}"
    for start, words in KINDS.items():
        if kind in (f"{start}_type", f"{start}_parsing", f"{start}_from_float"):
            return f"{place}: {words}{_shown(given)}"
    message = str(item["msg"]).removeprefix("Value error, ").replace("Input should be", "must be")
    if not place:
        return message
    return f"{place}: {message[0].lower()}{message[1:]}{_shown(given)}"


def of_one_kind(items: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The errors without those of kinds that a value was not meant to be.

    Where a value may be of several kinds (a file, a list of files, a hub source), pydantic tells of each why
    it is not that one. What was meant is the kind that an error lies deepest in; the first one if none does.
    """
    kinds: dict[tuple[Any, ...], dict[Any, list[Mapping[str, Any]]]] = {}
    for item in items:
        loc = tuple(item["loc"])
        at = next((i for i, part in enumerate(loc) if _is_branch(part)), len(loc))
        kinds.setdefault(loc[:at], {}).setdefault(loc[at : at + 1], []).append(item)
    return [
        item
        for found in kinds.values()
        for item in max(found.values(), key=lambda errors: max(len(error["loc"]) for error in errors))
    ]


def _is_branch(part: object) -> bool:
    """Whether a part of pydantic's place names a kind of value and no key, as `list[str]` does."""
    return isinstance(part, str) and BRANCH.match(part) is not None


def _shown(given: Any) -> str:
    return f" (given {given!r})" if isinstance(given, str | int | float) else ""


def _hint(model: type[BaseModel], path: Sequence[str]) -> str:
    """What an unknown key may have meant; else what there is."""
    near = _nearest(model, path)
    if near is not None:
        return f" (did you mean {near}?)"
    section = section_at(model, path[:-1]) or model
    if "arguments" in section.model_fields:
        place = ".".join(path[:-1])
        return f"; a field of transformers.TrainingArguments goes under {place}.arguments, see sqft schema"
    return f"; there are {', '.join(section.model_fields)}"


def _nearest(model: type[BaseModel], path: Sequence[str]) -> str | None:
    """The key that an unknown one may have meant: of its section, or of another one; None if none is near."""
    section = section_at(model, path[:-1]) or model
    wrong = path[-1]
    other = ALIASES.get(wrong, "")
    if other in section.model_fields:
        return other
    near = get_close_matches(wrong, section.model_fields, n=1)
    if near:
        return near[0]
    elsewhere = list(_elsewhere(model, {wrong, other}))
    return min(elsewhere, key=_unlikeliness, default=None)


def _elsewhere(model: type[BaseModel], wanted: set[str]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        for inner in inner_sections(field):
            yield from (f"{name}.{key}" for key in inner.model_fields if key in wanted)


def _unlikeliness(key: str) -> int:
    section = key.partition(".")[0]
    return LIKELY.index(section) if section in LIKELY else len(LIKELY)
