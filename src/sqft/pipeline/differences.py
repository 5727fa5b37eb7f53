"""What tells the recipes of compared runs apart, and whether a rate was tried far enough to both sides."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqft.artifacts import digest_json
from sqft.pipeline.keys import section_defaults
from sqft.pipeline.recipe import Recipe

__all__ = ["SEEDS", "differing_settings", "edge_notes", "flat_settings", "is_untold"]

# Settings by which runs are repeated, not told apart.
SEEDS = ("seed", "tune.seed", "train.seed")
UNTOLD = ("name", "runtime", "evaluate", *SEEDS)
RATES = (
    "tune.learning_rate",
    "train.learning_rate",
    "train.scale_learning_rate",
    "train.norm_learning_rate",
)

Values = Mapping[str, Any]


def differing_settings(recipes: Sequence[Values]) -> dict[str, list[str]]:
    """The settings that are not the same in all recipes, a value for each, "-" where there is none.

    A section that only some have is one setting, told by its method and what is not its default.
    """
    rows: dict[str, list[str]] = {}
    for name in dict.fromkeys(key for recipe in recipes for key in recipe if not is_untold(key)):
        parts = [recipe.get(name) for recipe in recipes]
        if any(isinstance(part, Mapping) for part in parts) and None in parts:
            rows[name] = ["-" if part is None else _brief(name, part) for part in parts]
            continue
        flat, defaults = [flat_settings({name: part}) for part in parts], section_defaults(Recipe, name)
        for key in dict.fromkeys(key for part in flat for key in part if not is_untold(key)):
            values = [part[key] for part in flat if key in part]
            settled = len(values) < len(flat) and all(v == defaults.get(key.split(".")[-1]) for v in values)
            if not settled:  # some have no such setting, and the others leave it as it is
                rows[key] = [_shown(part.get(key)) for part in flat]
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def edge_notes(recipes: Sequence[Values], losses: Sequence[float | None]) -> list[str]:
    """A line for each learning rate whose best value is an outermost, of runs that differ in nothing else.

    losses: of each recipe's model; None where it has none.
    """
    notes: dict[str, None] = {}
    flat = [flat_settings(recipe) for recipe in recipes]
    for rate in RATES:
        groups: dict[str, dict[float, float]] = {}
        for settings, loss in zip(flat, losses, strict=True):
            if settings.get(rate) is not None and loss is not None:
                others = {k: v for k, v in settings.items() if k != rate and not is_untold(k)}
                groups.setdefault(digest_json(others), {})[settings[rate]] = loss
        for found in groups.values():
            best = min(found, key=lambda value: found[value])
            if len(found) > 1 and best in (min(found), max(found)):
                side = "highest" if best == max(found) else "lowest"
                tried = ", ".join(f"{value:g}" for value in sorted(found))
                notes[
                    f"{rate}: of {tried} the {side}, {best:g}, is best, so the best may lie beyond; try a "
                    f"{side.removesuffix('est')}er one."
                ] = None
    return list(notes)


def _brief(name: str, section: Mapping[str, Any]) -> str:
    """A section in a few words: its method, and what is not its default."""
    defaults = section_defaults(Recipe, name)
    told = {key: value for key, value in flat_settings(section).items() if not is_untold(f"{name}.{key}")}
    method = [str(told.pop("method"))] if "method" in told else []
    others = [f"{key} {_shown(value)}" for key, value in told.items() if defaults.get(key) != value]
    return ", ".join(method + others) or "yes"


def is_untold(key: str) -> bool:
    """Whether a setting says nothing about what a run is: its name, its seeds, how it was measured."""
    return key in UNTOLD or key.split(".")[0] in UNTOLD


def flat_settings(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A recipe with section.key in place of sections."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= flat_settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def _shown(value: Any) -> str:
    return "-" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)
