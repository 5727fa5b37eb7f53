"""Several models beside one of them: the figures, and their place in JSON, Markdown and the terminal."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqft.report.content import finite_values
from sqft.report.summary import format_bytes

__all__ = [
    "ComparedRow",
    "ComparisonData",
    "Estimate",
    "Gap",
    "compare_table",
    "differing_table",
    "is_share",
    "markdown",
    "markdown_table",
]

PER_TOKEN = ("general text", "log perplexity")  # measures of a text, in nats a token


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Gap:
    """A row's figure minus the reference's, paired by item, with its 95 % interval.

    by_seed: the difference under each seed. p_value: two-sided; of accuracy with one seed McNemar's.
    """

    difference: float
    low: float
    high: float
    p_value: float
    by_seed: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ComparedRow:
    """One model, trained once or under several seeds.

    runs: where each came from. figures and gaps: by measure ("loss", "accuracy", "general text", "log
    perplexity", or a task and its metric); the reference has no gaps.
    """

    label: str
    runs: list[str]
    figures: dict[str, Estimate]
    gaps: dict[str, Gap] = field(default_factory=dict)
    size_bytes: int | None = None
    sparsity: float | None = None
    bits: int | None = None


@dataclass(frozen=True)
class ComparisonData:
    """What `sqft compare` shows. differing: settings that are not the same in all rows, a value for each."""

    reference: str
    rows: list[ComparedRow]
    num_items: dict[str, int]
    loss_unit: str
    differing: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def measures(self) -> list[str]:
        """Every measure that some row has, in the order in which they first appear."""
        return list(dict.fromkeys(name for row in self.rows for name in row.figures))

    def to_json(self) -> dict[str, Any]:
        """Plain values; a figure that is not finite becomes null."""
        values: dict[str, Any] = finite_values(asdict(self))
        return values


def compare_table(data: ComparisonData) -> list[list[str]]:
    """Header and one row a model, as text; a measure has its figure, and the gap to the reference."""
    columns: list[tuple[str, Callable[[ComparedRow], str]]] = [("model", lambda row: row.label)]
    if any(len(row.runs) > 1 for row in data.rows):
        columns.append(("seeds", lambda row: str(len(row.runs))))
    for measure in data.measures:
        columns += [
            (_title(measure, data), _figure_of(measure)),
            (f"to {data.reference}", _gap_of(measure)),
            ("p", _p_of(measure)),
        ]
    columns += [
        ("sparsity", lambda row: "" if row.sparsity is None else f"{100 * row.sparsity:.1f} %"),
        ("size", lambda row: "" if row.size_bytes is None else format_bytes(row.size_bytes)),
    ]
    table = [[title for title, _ in columns], *([cell(row) for _, cell in columns] for row in data.rows)]
    used = [place for place in range(len(columns)) if any(line[place] for line in table[1:])]
    return [[line[place] or "-" for place in used] for line in table]


def differing_table(data: ComparisonData) -> list[list[str]]:
    """The settings that are not the same in all models, with a header; the table is as narrow as it can be.

    One row a model, or, where there are more settings than models, one row a setting.
    """
    labels = [row.label for row in data.rows]
    by_setting = [["setting", *labels], *([key, *values] for key, values in data.differing.items())]
    if len(data.differing) > len(labels):
        return by_setting
    by_model = [list(column) for column in zip(*by_setting, strict=True)]
    return [["model", *by_model[0][1:]], *by_model[1:]]


def markdown(data: ComparisonData) -> str:
    """Both tables in Markdown, with a line that says how to read them."""
    parts = [markdown_table(compare_table(data)), *data.notes]
    if data.differing:
        parts.append(markdown_table(differing_table(data)))
    return "\n\n".join(parts)


def markdown_table(table: Sequence[Sequence[str]]) -> str:
    """Header and rows in Markdown, all but the first column to the right."""
    header, *rows = [[cell.replace("|", "\\|") for cell in line] for line in table]
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def is_share(measure: str) -> bool:
    """Whether a measure is a share of the items, which is shown in per cent."""
    return measure not in ("loss", *PER_TOKEN)


def _title(measure: str, data: ComparisonData) -> str:
    units = {"loss": f" ({data.loss_unit})"} | dict.fromkeys(PER_TOKEN, " (nats per token)")
    unit = units.get(measure, "")
    return f"{measure}{unit}"


def _figure_of(measure: str) -> Callable[[ComparedRow], str]:
    def cell(row: ComparedRow) -> str:
        found = row.figures.get(measure)
        if found is None:
            return ""
        factor, digits, unit = (100, 1, " %") if is_share(measure) else (1, 3, "")
        low, high = (f"{factor * bound:.{digits}f}" for bound in (found.low, found.high))
        known = math.isfinite(found.low) and math.isfinite(found.high)  # not of a single item
        return f"{factor * found.value:.{digits}f}{unit}" + (f" ({low}-{high})" if known else "")

    return cell


def _gap_of(measure: str) -> Callable[[ComparedRow], str]:
    def cell(row: ComparedRow) -> str:
        gap = row.gaps.get(measure)
        if gap is None:
            return ""
        factor, digits = (100, 1) if is_share(measure) else (1, 3)
        low, high = (f"{factor * bound:+.{digits}f}" for bound in (gap.low, gap.high))
        known = math.isfinite(gap.low) and math.isfinite(gap.high)
        return f"{factor * gap.difference:+.{digits}f}" + (f" ({low} to {high})" if known else "")

    return cell


def _p_of(measure: str) -> Callable[[ComparedRow], str]:
    def cell(row: ComparedRow) -> str:
        gap = row.gaps.get(measure)
        if gap is None:
            return ""
        if not math.isfinite(gap.low):
            return ""
        return "<0.001" if gap.p_value < 0.001 else f"{gap.p_value:.3f}"

    return cell
