"""The figures of a report, and their place in report.json."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from sqft.artifacts import REPORT
from sqft.checks import Check
from sqft.errors import WorkspaceError

__all__ = [
    "LayerRow",
    "LineageRow",
    "ModelRow",
    "ReportData",
    "finite_values",
    "read_report",
]


@dataclass(frozen=True)
class ModelRow:
    """One measured model; None where something was not measured.

    loss: nats (`report.summary.loss_unit`). accuracy: share of the items, 0-1. Both with 95 % intervals.
    general_loss: nats a token on a text that is not of the task.
    sparsity: the share of zeros among the weights that the recipe may prune. bits: of the integers that the
    weights are stored as; None for 16-bit weights.
    """

    name: str
    loss: float | None = None
    loss_low: float | None = None
    loss_high: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    num_items: int | None = None
    size_bytes: int | None = None
    sparsity: float | None = None
    bits: int | None = None
    perplexity: float | None = None
    general_loss: float | None = None
    tasks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class LayerRow:
    """One linear layer after compression; error: relative to the dense layer's output."""

    name: str
    sparsity: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class LineageRow:
    """One step from the source model to the result: a stage and the hash that names its directory."""

    stage: str
    key: str
    directory: str = ""
    seconds: float = 0.0
    reused: bool = False


@dataclass(frozen=True)
class ReportData:
    """Everything that a report shows.

    checks: None where nothing was merged. ranks: rank group to the rank that was chosen.
    training: (optimizer step, loss); eval_losses: the same, on the search items.
    chance_accuracy: what guessing would reach.
    """

    name: str
    models: list[ModelRow]
    recipe: dict[str, Any]
    versions: dict[str, str]
    elapsed_seconds: float
    checks: list[Check] | None = None
    stage_seconds: dict[str, float] = field(default_factory=dict)
    layers: list[LayerRow] = field(default_factory=list)
    ranks: dict[str, int] = field(default_factory=dict)
    training: list[tuple[int, float]] = field(default_factory=list)
    eval_losses: list[tuple[int, float]] = field(default_factory=list)
    lineage: list[LineageRow] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    chance_accuracy: float | None = None
    merged_dir: str | None = None

    @property
    def among_choices(self) -> bool:
        """Whether the items are of multiple choice, so that a loss is about the choices alone."""
        return self.chance_accuracy is not None

    @property
    def passed(self) -> bool | None:
        """Whether every check of the certificate passed; None without a certificate."""
        return None if self.checks is None else bool(self.checks) and all(c.passed for c in self.checks)

    def to_json(self) -> dict[str, Any]:
        """The contents of report.json; a figure that is not finite becomes null."""
        values = asdict(self)
        checks = values.pop("checks")
        values["certificate"] = None if checks is None else {"passed": self.passed, "checks": checks}
        finite: dict[str, Any] = finite_values(values)
        return finite

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ReportData":
        """The inverse of `to_json`. Raises: KeyError, TypeError if it is not such a report."""
        values = dict(values)
        certificate = values.pop("certificate")
        training, held_out = values.pop("training", []), values.pop("eval_losses", [])
        rows: dict[str, Any] = {
            "models": [ModelRow(**row) for row in values.pop("models")],
            "layers": [LayerRow(**row) for row in values.pop("layers", [])],
            "lineage": [LineageRow(**row) for row in values.pop("lineage", [])],
            "training": [(int(step), float(loss)) for step, loss in training if loss is not None],
            "eval_losses": [(int(step), float(loss)) for step, loss in held_out if loss is not None],
            "checks": None if certificate is None else [Check(**row) for row in certificate["checks"]],
        }
        return cls(**rows, **values)


def read_report(directory: Path) -> ReportData:
    """Read report.json of a results directory.

    Raises: WorkspaceError if there is none, or it is damaged.
    """
    path = directory / REPORT
    try:
        return ReportData.from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise WorkspaceError(f"{directory} has no report.json; run a recipe first") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise WorkspaceError(f"{path} is not a report of this version ({error}); run again") from error


def finite_values(value: Any) -> Any:
    """A value for JSON, in which a number that is not finite is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite_values(item) for item in value]
    return value
