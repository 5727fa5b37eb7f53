"""What the keys of a recipe take, for overrides from the command line and for messages."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

__all__ = ["inner_sections", "section_at", "section_defaults", "takes_text"]


def takes_text(model: type[BaseModel], path: Sequence[str], value: Any) -> bool:
    """Whether the key at a path takes a text and nothing of the type of this value, which is not a text."""
    section = section_at(model, path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    if field is None or value is None or isinstance(value, str):
        return False
    kinds = list(_kinds(field.annotation))
    texts = any(
        kind is str or (get_origin(kind) is Literal and isinstance(get_args(kind)[0], str)) for kind in kinds
    )
    return texts and not any(_accepts(kind, value) for kind in kinds)


def section_defaults(model: type[BaseModel], name: str) -> dict[str, Any]:
    """The defaults of a section's settings; settings without a default are left out."""
    section = section_at(model, [name])
    fields = section.model_fields if section else {}
    return {key: field.default for key, field in fields.items() if not field.is_required()}


def _accepts(kind: Any, value: Any) -> bool:
    origin = get_origin(kind) or kind
    if isinstance(value, dict):
        return origin is dict or (isinstance(origin, type) and issubclass(origin, BaseModel))
    if isinstance(value, list):
        return origin is list
    return origin in (int, float, bool)


def section_at(model: type[BaseModel], path: Sequence[str]) -> type[BaseModel] | None:
    """The section that a path leads to; the recipe itself for an empty one."""
    for key in path:
        field = model.model_fields.get(key)
        inner = next(inner_sections(field), None) if field else None
        if inner is None:
            return None
        model = inner
    return model


def inner_sections(field: FieldInfo) -> Iterator[type[BaseModel]]:
    """The sections that a field may hold."""
    for kind in _kinds(field.annotation):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield kind


def _kinds(annotation: Any) -> Iterator[Any]:
    """The alternatives of a type annotation, without their validators."""
    origin = get_origin(annotation)
    if origin is Annotated:
        yield from _kinds(get_args(annotation)[0])
    elif origin is Union or type(annotation).__name__ == "UnionType":
        for option in get_args(annotation):
            yield from _kinds(option)
    else:
        yield annotation
