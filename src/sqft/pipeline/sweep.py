"""Many runs out of one recipe: lists become runs, one for each combination of their values.

    sparsify: {sparsity: [0.3, 0.5, 0.7]}
    train: {seed: [0, 1, 2]}

makes nine runs. Where a value is a list by nature (`adapters.ranks`), a list of lists is needed. Settings
that change together are named in the section `sweep`:

    sweep:
      axes:
        pipeline:
          shears: {adapters.method: lora}
          sparse-peft: {adapters.method: sparse_peft}
      products:                                      # default: every axis, every choice
        - {pipeline: all, adapters.ranks: [[16], [32, 24, 16]]}
        - {pipeline: sparse-peft, train.seed: [1, 2]}

A product crosses what it names with each other, and with the lists of the recipe itself.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from sqft.artifacts import digest_json
from sqft.errors import RecipeError
from sqft.pipeline.recipe import Recipe
from sqft.pipeline.recipe_file import parse_recipe, read_recipe_values, set_value

__all__ = ["Cell", "Sweep", "choose_cells", "expand_sweep", "load_sweep"]

MANY_CELLS = 100  # from here on, a sweep is run only when asked for twice

Values = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """One run of a sweep. choices: what it takes on each axis, as text; empty where nothing varies."""

    name: str
    choices: dict[str, str]
    recipe: Recipe


@dataclass(frozen=True)
class Sweep:
    """All runs of a sweep, each recipe once."""

    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class _Choice:
    """One value of an axis: how it is called, and the settings it makes."""

    label: str
    settings: Mapping[str, Any]


_Axes = dict[str, list[_Choice]]


def load_sweep(path: Path | str, overrides: list[str] | None = None, *, many: bool = False) -> Sweep:
    """Read a recipe with lists, apply overrides, and expand it; a recipe without lists is a sweep of one run.

    many: also more than 100 cells.

    Raises: RecipeError for a wrong recipe, naming the cell, and for more cells than expected.
    """
    return expand_sweep(read_recipe_values(path, overrides), path=Path(path), many=many)


def expand_sweep(values: Values, *, path: Path | None = None, many: bool = False) -> Sweep:
    """The runs of a recipe given as nested dictionaries, as `load_sweep` describes them.

    path: the file that it came from.

    Raises: RecipeError as there.
    """
    values, origin = deepcopy(values), str(path or "recipe")
    section = values.pop("sweep", None) or {}
    name = str(values.get("name", "recipe"))
    products = _products(section, _lists_of(values, ""), origin)
    count = sum(math.prod(len(choices) for choices in axes.values()) for axes in products)
    if count > MANY_CELLS and not many:
        sizes = " + ".join(" x ".join(str(len(c)) for c in axes.values()) or "1" for axes in products)
        raise RecipeError(f"{origin} expands into {count:,} cells ({sizes}); shorten a list, or add --yes")
    cells: dict[str, Cell] = {}
    seen: set[str] = set()
    for combination in itertools.chain.from_iterable(_combinations(axes) for axes in products):
        chosen = deepcopy(values)
        for choice in combination.values():
            for key, value in choice.settings.items():
                _apply(chosen, str(key), value)
        identity = digest_json(chosen)
        if identity in seen:
            continue
        seen.add(identity)
        varied = {axis: choice.label for axis, choice in combination.items() if choice.label}
        label = "-".join(varied.values()) or "run"
        if label in cells:
            label = f"{label}-{identity[:6]}"
        chosen["name"] = f"{name}/{label}"
        recipe = parse_recipe(chosen, origin=f"{origin}, cell {label}", path=path)
        cells[label] = Cell(label, varied, recipe)
    return Sweep(name, list(cells.values()))


def choose_cells(sweep: Sweep, patterns: Sequence[str] | None) -> Sweep:
    """The runs whose names fit one of the patterns (`*` is anything); all without patterns.

    Raises: RecipeError for a pattern that fits none.
    """
    if not patterns:
        return sweep
    for pattern in patterns:
        if not any(fnmatchcase(cell.name, pattern) for cell in sweep.cells):
            names = ", ".join(cell.name for cell in sweep.cells[:12])
            raise RecipeError(f"{sweep.name} has no run {pattern}; it has {names}")
    kept = [cell for cell in sweep.cells if any(fnmatchcase(cell.name, p) for p in patterns)]
    return replace(sweep, cells=kept)


def _combinations(axes: _Axes) -> Iterator[dict[str, _Choice]]:
    for combination in itertools.product(*axes.values()):
        yield dict(zip(axes, combination, strict=True))


def _products(section: Any, lists: _Axes, origin: str) -> list[_Axes]:
    """The axes of every product; those of the recipe's own lists come last, so that seeds end a name."""
    if not isinstance(section, dict) or not set(section) <= {"axes", "products"}:
        raise RecipeError(f"{origin}: sweep has the keys axes and products, no others")
    named = _named_axes(section.get("axes") or {}, origin)
    products = section.get("products")
    if products is None:
        return [{**named, **lists}]
    if not isinstance(products, list) or not products or not all(isinstance(p, dict) for p in products):
        raise RecipeError(f"{origin}: sweep.products is a list of mappings, axis: choices")
    found = []
    for product in products:
        axes = {str(key): _axis(str(key), value, named, origin) for key, value in product.items()}
        found.append({**axes, **{key: choices for key, choices in lists.items() if key not in axes}})
    return found


def _named_axes(axes: Any, origin: str) -> _Axes:
    named: _Axes = {}
    if not isinstance(axes, dict):
        raise RecipeError(f"{origin}: sweep.axes maps the name of an axis to its choices")
    for axis, choices in axes.items():
        if not isinstance(choices, dict) or not choices:
            raise RecipeError(f"{origin}: sweep.axes.{axis} maps the names of choices to settings")
        for label, settings in choices.items():
            if settings is not None and not isinstance(settings, dict):
                raise RecipeError(f"{origin}: sweep.axes.{axis}.{label} maps section.key to values")
        named[str(axis)] = [_Choice(str(label), settings or {}) for label, settings in choices.items()]
    return named


def _axis(key: str, value: Any, named: _Axes, origin: str) -> list[_Choice]:
    """The choices that a product takes on one axis: by name, or the values of a setting."""
    if key not in named:
        if "." not in key and key not in Recipe.model_fields:
            raise RecipeError(f"{origin}: sweep.products: {key} is neither an axis nor a setting")
        return _value_choices(key, value) if _is_axis(key, value) else [_Choice("", {key: value})]
    known = {choice.label: choice for choice in named[key]}
    wanted = list(known) if value == "all" else value if isinstance(value, list) else [value]
    unknown = [str(label) for label in wanted if str(label) not in known]
    if unknown or not wanted:
        raise RecipeError(
            f"{origin}: sweep.products: axis {key} has no {', '.join(unknown) or 'choice'}; it has "
            f"{', '.join(known)}"
        )
    return [known[str(label)] for label in wanted]


def _lists_of(values: Values, prefix: str) -> _Axes:
    """Every setting of a recipe that holds several values, in the recipe's order."""
    found: _Axes = {}
    for key, value in values.items():
        path = f"{prefix}{key}"
        if isinstance(value, list) and _is_axis(path, value):
            found[path] = _value_choices(path, value)
        elif isinstance(value, dict) and not prefix:
            found |= _lists_of(value, f"{path}.")
    return found


def _is_axis(path: str, value: Any) -> bool:
    """Whether a list stands for several values, since the setting itself cannot be that list."""
    if not isinstance(value, list) or not value:
        return False
    adapter = _field(path)
    if adapter is None:  # an unknown key; the recipe's check names it
        return False
    try:
        adapter.validate_python(value)
    except ValidationError:
        return True
    return False


@cache
def _field(path: str) -> TypeAdapter[Any] | None:
    """What a setting may hold, by its type alone."""
    model: Any = Recipe
    *sections, last = path.split(".")
    for name in sections:
        field = model.model_fields.get(name) if model else None
        model = next(
            (part for part in _parts(field.annotation) if issubclass(part, BaseModel)) if field else iter(()),
            None,
        )
    field = model.model_fields.get(last) if model else None
    if field is None:
        return None
    annotation: Any = field.annotation
    for extra in field.metadata:
        annotation = Annotated[annotation, extra]
    return TypeAdapter(annotation)


def _parts(annotation: Any) -> list[type]:
    """The classes of `A | None`."""
    return [part for part in getattr(annotation, "__args__", (annotation,)) if isinstance(part, type)]


def _value_choices(path: str, values: list[Any]) -> list[_Choice]:
    key = path.split(".")[-1]
    labels = [_label(key, value, place) for place, value in enumerate(values)]
    if len(set(labels)) < len(labels):
        labels = [f"{label}-{place}" for place, label in enumerate(labels)]
    return [_Choice(label, {path: value}) for label, value in zip(labels, values, strict=True)]


def _label(key: str, value: Any, place: int) -> str:
    """A short name of a value that a folder can carry: sparsity0.5, ranks32-24-16, no-sparsify."""
    if value is None or value is False:
        return f"no-{key}"
    if value is True:
        return key
    if isinstance(value, dict):
        return f"{key}{place}"
    text = "-".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.replace("e+", "e") if isinstance(value, float) else text  # 1e+30 is not 1e-30
    slug = re.sub(r"[^A-Za-z0-9._]+", "-", text.rstrip("/").split("/")[-1]).strip("-._")[:40]
    return slug if isinstance(value, str) and slug else f"{key}{slug or place}"


def _apply(values: Values, path: str, value: Any) -> None:
    """Set section.key; a mapping is merged into a section that is there, null takes a section or key away."""
    there: Any = values
    for key in path.split("."):
        there = there.get(key) if isinstance(there, dict) else None
    if isinstance(value, dict) and isinstance(there, dict):
        for key, inner in value.items():
            _apply(there, str(key), inner)
    else:
        set_value(values, path, deepcopy(value))
        if value is None:
            *sections, last = path.split(".")
            node = values
            for key in sections:
                node = node[key]
            del node[last]
