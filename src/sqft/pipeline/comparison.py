"""Finished runs and evaluations beside one another, paired by item.

Two models can be compared where they answered the same items after the same prompts; everything else is
refused, since a difference would then be one of the questions.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqft.artifacts import ITEM_FIGURES, REPORT, digest_json
from sqft.errors import DataError, WorkspaceError
from sqft.marks import EVALUATIONS
from sqft.pipeline.differences import SEEDS, differing_settings, edge_notes, flat_settings, is_untold
from sqft.report import ModelRow, ReportData, read_report
from sqft.report.comparison import ComparedRow, ComparisonData, Estimate, Gap, is_share
from sqft.report.summary import label_model, loss_unit

__all__ = ["Measured", "compare_runs", "find_measured"]


@dataclass(frozen=True)
class Measured:
    """One model that was measured: its row, what every item gave, and the recipe that it came from.

    place: the directory it was found in. last: whether it is what the run was for.
    """

    place: str
    row: ModelRow
    items: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)
    last: bool = True


@dataclass(frozen=True)
class _Series:
    """The values of one measure, item by item; units: answer tokens of a loss, one of a share."""

    ids: list[str]
    values: list[float]
    units: list[int]


def find_measured(target: str) -> list[Measured]:
    """What a results directory, a sweep's, an evaluated model or an evaluation's JSON file holds.

    target: a path; `PATH:MODEL` for one model of a run, as the report's rows are called in report.json.

    Raises: WorkspaceError if nothing was measured there.
    """
    path, colon, model = target.rpartition(":")
    if not colon or Path(target).exists():
        path, model = target, ""
    found = _measured_in(Path(path))
    if not found:
        raise WorkspaceError(
            f"{path} holds no measured model; give the results of sqft run or sqft sweep, or a directory "
            "that sqft evaluate was run on"
        )
    if not model:
        return found
    chosen = [one for one in found if one.row.name == model]
    if not chosen:
        names = ", ".join(sorted({one.row.name for one in found}))
        raise WorkspaceError(f"{path} has no row {model}; it has {names}")
    return [Measured(m.place, m.row, m.items, m.recipe, last=True) for m in chosen]


def compare_runs(
    targets: Sequence[str], *, reference: str | None = None, every_model: bool = False, common: bool = False
) -> ComparisonData:
    """Compare what the targets hold; runs that differ only in their seeds become one row.

    reference: the target that gaps are taken to; default the first. every_model: all rows of a run, not only
    what it was for. common: compare on the items that all have, where some measured more.

    Raises: WorkspaceError if a target holds nothing, DataError if two cannot be compared.
    """
    wanted = list(dict.fromkeys([reference, *targets] if reference else targets))
    measured = [one for target in wanted for one in find_measured(str(target)) if one.last or every_model]
    groups = _by_seed(measured)
    if len(groups) < 2:
        raise DataError("there is one model, and nothing to compare it with; name two runs or more")
    names = _names(groups)
    series = {name: [_series(one) for one in group] for name, group in zip(names, groups, strict=True)}
    notes = _check_items(series, common)
    rows = []
    for name, group in zip(names, groups, strict=True):
        figures = {m: _estimate(m, [s[m] for s in series[name]]) for m in series[name][0]}
        gaps = {}
        if name != names[0]:
            shared = [m for m in figures if all(m in s for s in series[names[0]])]
            gaps = {m: _gap(m, series[names[0]], series[name]) for m in shared}
        row = group[0].row
        places = [one.place for one in group]
        rows.append(ComparedRow(name, places, figures, gaps, row.size_bytes, row.sparsity, row.bits))
    counts = {m: len(s.ids) for m, s in series[names[0]][0].items()}
    recipes = [group[0].recipe for group in groups]
    losses = [found.value if (found := row.figures.get("loss")) else None for row in rows]
    notes += edge_notes(recipes, losses)
    differing = differing_settings(recipes)
    # Among choices an item counts once; an answer has its own tokens and the one that ends it.
    unit = loss_unit(among_choices=set(measured[0].items.get("answer_tokens", [])) == {1})
    return ComparisonData(names[0], rows, counts, unit, differing, notes)


def _measured_in(path: Path) -> list[Measured]:
    if path.is_file():
        return [_merged([_read_evaluation(path)])]
    if (path / REPORT).is_file():
        return _run(path)
    files = [file for file in (path / EVALUATIONS).glob("*.json") if not file.name.startswith(".")]
    if files:
        return [_merged([_read_evaluation(file) for file in files])]
    return [one for report in sorted(path.glob("*/report.json")) for one in _run(report.parent)]


def _run(directory: Path) -> list[Measured]:
    report: ReportData = read_report(directory)
    try:
        items = json.loads((directory / ITEM_FIGURES).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WorkspaceError(
            f"{directory} has no {ITEM_FIGURES}, so nothing can be paired; "
            "run its recipe again (what is done stays)"
        ) from None
    except ValueError as error:
        raise WorkspaceError(
            f"{directory / ITEM_FIGURES} is damaged ({error}); run the recipe again"
        ) from error
    rows = [row for row in report.models if row.name in items]
    return [
        Measured(str(directory), row, items[row.name], report.recipe, last=row is rows[-1]) for row in rows
    ]


def _read_evaluation(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        ModelRow(**values["row"])
        if not all(isinstance(values[key], dict) for key in ("items", "recipe", "model")):
            raise TypeError("a part is not an object")
        return values | {"date": str(values["date"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WorkspaceError(
            f"{path} is not an evaluation of this version ({error}); evaluate again"
        ) from error


def _merged(evaluations: list[dict[str, Any]]) -> Measured:
    """The evaluations of one model as one; where two measured the same, the later one counts."""
    evaluations = sorted(evaluations, key=lambda values: values["date"])
    items: dict[str, Any] = {}
    recipe: dict[str, Any] = {}
    for values in evaluations:
        tasks = {**items.get("tasks", {}), **values["items"].get("tasks", {})}
        items |= values["items"] | ({"tasks": tasks} if tasks else {})
        recipe |= values["recipe"]
    last = evaluations[-1]
    return Measured(
        last["model"].get("adapter") or last["model"]["path"], ModelRow(**last["row"]), items, recipe
    )


def _by_seed(measured: Sequence[Measured]) -> list[list[Measured]]:
    """Models whose recipes are the same but for the seed, together; each run of the same stage once."""
    groups: dict[str, list[Measured]] = {}
    for one in measured:
        told = {key: value for key, value in flat_settings(one.recipe).items() if not is_untold(key)}
        identity = digest_json([one.row.name, told, one.place if not one.recipe else ""])
        group = groups.setdefault(identity, [])
        if all(digest_json(one.items) != digest_json(other.items) for other in group):
            group.append(one)
    for group in groups.values():
        group.sort(key=lambda one: [flat_settings(one.recipe).get(key) or 0 for key in SEEDS])
    return list(groups.values())


def _names(groups: Sequence[Sequence[Measured]]) -> list[str]:
    """A short name for each row: the folder, what the model is, or where; both where that is not enough."""
    folders = [_folder(group) for group in groups]
    kinds = [label_model(group[0].row, group[0].recipe) for group in groups]
    paths = ["/".join(Path(group[0].place).resolve().parts[-2:]) for group in groups]
    for names in (folders, kinds, paths):
        if len(set(names)) == len(groups):
            return names
    names = []
    for folder, kind in zip(folders, kinds, strict=True):
        name, number = f"{folder}: {kind}", 2
        while name in names:
            name, number = f"{folder}: {kind} ({number})", number + 1
        names.append(name)
    return names


def _folder(group: Sequence[Measured]) -> str:
    """The name of a group's folder, without the seeds that its members differ in."""
    names = [Path(one.place).resolve().name for one in group]
    if len(names) == 1:
        return names[0]
    words = [name.split("-") for name in names]
    shared = [word for word in words[0] if all(word in other for other in words)]
    return "-".join(shared) or names[0]


def _series(one: Measured) -> dict[str, _Series]:
    """Every measure of a model, item by item."""
    items, found = one.items, {}
    ids = items.get("ids")
    if "loss_sums" in items:
        if ids is None:
            raise DataError(
                f"{one.place} was measured by a version of sqft that did not record its items; run it again"
            )
        found["loss"] = _Series(ids, items["loss_sums"], items["answer_tokens"])
        found["accuracy"] = _Series(ids, [float(right) for right in items["correct"]], [1] * len(ids))
    for measure, key in (("general text", "general"), ("log perplexity", "perplexity")):
        if f"{key}_sums" in items:
            counts = items[f"{key}_tokens"]
            text = [f"{items[f'{key}_text']}:{place}" for place in range(len(counts))]
            found[measure] = _Series(text, items[f"{key}_sums"], counts)
    for task, figures in items.get("tasks", {}).items():
        for metric, values in figures.get("items", {}).items():
            if metric.startswith(("acc", "exact_match")) and len(values) == len(figures["items"]["ids"]):
                name = f"{task} ({metric.removesuffix(',none').replace(',', ', ')})"
                found[name] = _Series(figures["items"]["ids"], values, [1] * len(values))
    return found


def _check_items(series: dict[str, list[dict[str, _Series]]], common: bool) -> list[str]:
    """Refuse measures of different items, or cut all to those in common; says what was cut."""
    flat = [(name, one) for name, group in series.items() for one in group]
    first, reference = flat[0]
    notes, compared = [], 0
    for measure in list(reference):
        others = [(name, one) for name, one in flat[1:] if measure in one]
        compared += len(others)
        if common:
            notes += _cut_to_common(measure, [one for _, one in [flat[0], *others]])
        for name, other in others:
            _check_pair(measure, (first, reference[measure]), (name, other[measure]))
    if not compared:
        told = "; ".join(f"{name}: {', '.join(one) or 'nothing'}" for name, one in flat[:4])
        raise DataError(f"{first} shares no measure with the others ({told}); measure them on the same items")
    return notes


def _check_pair(measure: str, first: tuple[str, _Series], second: tuple[str, _Series]) -> None:
    one, other = first[1], second[1]
    both = len(set(one.ids) & set(other.ids))
    if one.ids != other.ids:
        hint = "; --common compares those" if both else ", or asked with another prompt"
        raise DataError(
            f"{first[0]} and {second[0]} cannot be compared: {measure} was measured on {len(one.ids)} and "
            f"{len(other.ids)} items, of which {both} are the same{hint}"
        )
    if one.units != other.units:
        raise DataError(
            f"{first[0]} and {second[0]} cannot be compared: their tokenizers split the answers differently, "
            "so their losses per token say different things"
        )


def _cut_to_common(measure: str, ones: Sequence[dict[str, _Series]]) -> list[str]:
    kept = set(ones[0][measure].ids).intersection(*(one[measure].ids for one in ones[1:]))
    most = max(len(one[measure].ids) for one in ones)
    if not kept:
        raise DataError(f"{measure}: no item is common to all, so there is nothing to compare on")
    for one in ones:
        one[measure] = _cut(one[measure], kept)
    if len(kept) == most:
        return []
    return [f"{measure}: on the {len(kept)} items that all have, of up to {most}."]


def _cut(series: _Series, kept: set[str]) -> _Series:
    """A series on some items, sorted by id, so that all have the same order."""
    places = sorted((i for i, name in enumerate(series.ids) if name in kept), key=lambda i: series.ids[i])
    return _Series(
        [series.ids[i] for i in places],
        [series.values[i] for i in places],
        [series.units[i] for i in places],
    )


def _estimate(measure: str, seeds: Sequence[_Series]) -> Estimate:
    """A row's own figure; of answers Wilson's interval, which does not shrink to nothing at 0 of 12."""
    from sqft.evaluation import paired_difference
    from sqft.evaluation.intervals import wilson_interval

    nothing = [[0.0] * len(one.values) for one in seeds]
    found = paired_difference(nothing, [one.values for one in seeds], seeds[0].units)
    low, high = found.low, found.high
    if _counts_answers(measure, seeds) and (len(seeds) == 1 or low == high):
        total = len(seeds[0].values)
        low, high = wilson_interval(round(found.difference * total), total)
    if math.isfinite(low) and math.isfinite(high):  # few seeds reach beyond what there is
        low, high = max(0.0, low), min(high, 1.0) if is_share(measure) else high
    return Estimate(found.difference, low, high)


def _gap(
    measure: str, first: Sequence[Mapping[str, _Series]], second: Sequence[Mapping[str, _Series]]
) -> Gap:
    """The difference of two rows; of unequal numbers of seeds, as many as both have."""
    from sqft.evaluation import compare_correct, paired_difference

    before, after = [one[measure] for one in first], [one[measure] for one in second]
    if len(before) != len(after):  # one of them was not trained: it stands against every seed of the other
        sizes = len(before), len(after)
        count = max(sizes) if 1 in sizes else min(sizes)
        before, after = (before * count)[:count], (after * count)[:count]
    values = [one.values for one in before], [one.values for one in after]
    if _counts_answers(measure, [*before, *after]):
        found = compare_correct(*([[bool(v) for v in seed] for seed in side] for side in values))
    else:
        found = paired_difference(*values, before[0].units)
    return Gap(found.difference, found.low, found.high, found.p_value, found.by_seed)


def _counts_answers(measure: str, series: Sequence[_Series]) -> bool:
    """Whether a measure says of each item only whether it was right."""
    return is_share(measure) and all(value in (0.0, 1.0) for one in series for value in one.values)
