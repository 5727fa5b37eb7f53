"""The table of models, the same in the terminal, in Markdown and on the page."""

from collections.abc import Callable, Sequence
from typing import Any

from sqft.report.content import ModelRow, ReportData

__all__ = ["format_bytes", "format_seconds", "label_model", "loss_unit", "markdown_table", "summary_table"]

# Below these shares of zeros a model counts as dense: 16-bit weights are zero by chance only, and integers
# also by rounding (a dense INT4 model has 22 % zeros).
STRAY_ZEROS, ROUNDED_ZEROS = 0.01, 0.4
DENSE = ("base", "tuned", "dense_tuned")  # before anything is compressed


def summary_table(data: ReportData) -> list[list[str]]:
    """Header and one row a model of a run, as text; columns that nothing was measured for are left out."""
    return models_table(
        data.models,
        loss_unit(among_choices=data.among_choices),
        lambda row: label_model(row, data.recipe),
    )


def models_table(
    models: Sequence[ModelRow], unit: str, label: Callable[[ModelRow], str] = lambda row: row.name
) -> list[list[str]]:
    """Header and one row a model, as text. unit: of the loss. label: what a row is called."""
    columns: list[tuple[str, Callable[[ModelRow], str]]] = [
        ("model", label),
        (
            f"loss ({unit})",
            lambda row: _interval(row.loss, row.loss_low, row.loss_high, "{:.3f}"),
        ),
        ("accuracy", lambda row: _percent_interval(row.accuracy, row.accuracy_low, row.accuracy_high)),
        ("items", lambda row: "" if row.num_items is None else str(row.num_items)),
        ("general text (nats)", lambda row: "" if row.general_loss is None else f"{row.general_loss:.3f}"),
        ("perplexity", lambda row: "" if row.perplexity is None else f"{row.perplexity:.2f}"),
        ("sparsity", lambda row: "" if row.sparsity is None else f"{100 * row.sparsity:.1f} %"),
        ("size", lambda row: "" if row.size_bytes is None else format_bytes(row.size_bytes)),
    ]
    columns += [(task, _task_column(task)) for task in sorted({t for row in models for t in row.tasks})]
    table = [[title for title, _ in columns]]
    table += [[cell(row) for _, cell in columns] for row in models]
    used = [i for i in range(len(columns)) if any(line[i] for line in table[1:])]
    return [[line[i] or "-" for i in used] for line in table]


def markdown_table(data: ReportData) -> str:
    """The table of models in Markdown, numbers to the right."""
    header, *rows = summary_table(data)
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, rule, *rows])


def label_model(row: ModelRow, recipe: dict[str, Any]) -> str:
    """What a row of this recipe is, in words.

    A model may also arrive sparse or quantized: its zeros and bits then say so, not the recipe.
    """
    quantize = recipe.get("quantize")
    bits = row.bits if quantize is None or row.name in DENSE else quantize.get("bits", 4)
    made_sparse = recipe.get("sparsify") is not None and row.name not in DENSE
    sparse = made_sparse or (row.sparsity or 0.0) > (STRAY_ZEROS if bits is None else ROUNDED_ZEROS)
    compressed = " ".join(part for part in ("sparse" if sparse else "", f"INT{bits}" if bits else "") if part)
    labels = {
        "base": f"base, {compressed or 'dense'}",
        "tuned": "tuned, dense",
        "dense_tuned": "dense + LoRA (reference)",
        "sparse": "sparse",
        "quantized": compressed or "quantized",
        "reconstructed": f"{compressed}, reconstructed".strip(", "),
        "adapted": f"{compressed} + adapter".strip(),
        "merged": f"merged, {compressed}".strip(", "),
    }
    return labels.get(row.name, row.name)


def format_bytes(count: float) -> str:
    """1234567 → '1.2 MB' (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def format_seconds(seconds: float) -> str:
    """75 → '1 min 15 s'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def loss_unit(*, among_choices: bool) -> str:
    """What a loss counts: nats per answer token, or per item among its choices."""
    return "nats, among the choices" if among_choices else "nats per answer token"


def _task_column(task: str) -> Callable[[ModelRow], str]:
    return lambda row: f"{row.tasks[task]:.3f}" if task in row.tasks else ""


def _interval(value: float | None, low: float | None, high: float | None, form: str) -> str:
    if value is None:
        return ""
    shown = form.format(value)
    return shown if low is None or high is None else f"{shown} ({form.format(low)}-{form.format(high)})"


def _percent_interval(value: float | None, low: float | None, high: float | None) -> str:
    if value is None:
        return ""
    shown = f"{100 * value:.1f} %"
    return shown if low is None or high is None else f"{shown} ({100 * low:.1f}-{100 * high:.1f})"
