"""What the keys of a recipe are called and take, for overrides from the command line and for messages."""

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

__all__ = ["nearest_key", "section_defaults", "takes_text"]

# What other tools call these.
ALIASES = {
    "early_stopping_patience": "early_stopping",
    "exclude_modules": "skip_modules",
    "gradient_accumulation_steps": "gradient_accumulation",
    "load_best_model_at_end": "keep",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lr": "learning_rate",
    "max_length": "sequence_length",
    "max_seq_length": "sequence_length",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "r": "ranks",
    "rank": "ranks",
    "save_steps": "checkpoint_steps",
    "seq_len": "sequence_length",
}


def nearest_key(model: type[BaseModel], path: Sequence[str]) -> str | None:
    """The key that an unknown one may have meant: of its section, or of another one; None if none is near."""
    section = _section(model, path[:-1]) or model
    wrong = path[-1]
    if ALIASES.get(wrong) in section.model_fields:
        return ALIASES[wrong]
    near = get_close_matches(wrong, section.model_fields, n=1)
    if near:
        return near[0]
    for name, field in model.model_fields.items():
        for inner in _sections(field):
            if wrong in inner.model_fields:
                return f"{name}.{wrong}"
    return None


def takes_text(model: type[BaseModel], path: Sequence[str], value: Any) -> bool:
    """Whether the key at a path takes a text, and nothing like this value, which is none."""
    section = _section(model, path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    if field is None or value is None or isinstance(value, str):
        return False
    kinds = list(_kinds(field.annotation))
    texts = any(
        kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str)) for kind in kinds
    )
    return texts and not any(_accepts(kind, value) for kind in kinds)


def section_defaults(model: type[BaseModel], name: str) -> dict[str, Any]:
    """What the settings of a section are where nothing is said; those that have to be said are not there."""
    section = _section(model, [name])
    fields = section.model_fields if section else {}
    return {key: field.default for key, field in fields.items() if not field.is_required()}


def _accepts(kind: Any, value: Any) -> bool:
    origin = get_origin(kind) or kind
    if isinstance(value, dict):
        return origin is dict or (isinstance(origin, type) and issubclass(origin, BaseModel))
    if isinstance(value, list):
        return origin is list
    return origin in (int, float, bool)


def _section(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The section that a path leads to; the recipe itself for an empty one."""
    for key in path:
        field = model.model_fields.get(key)
        inner = next(_sections(field), None) if field else None
        if inner is None:
            return None
        model = inner
    return model


def _sections(field: FieldInfo) -> Iterator[type[BaseModel]]:
    for kind in _kinds(field.annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of an annotation, without what checks them."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin is Union or type(annotation).__name__ == "UnionType":
        for option in get_args(annotation):
            yield from _kinds(option)
    else:
        yield annotation
