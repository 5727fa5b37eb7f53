"""The GPU benchmark's aims and tables, made of what is measured so far."""

import statistics
from typing import Any

from benchmarks.common import check, checks_table, markdown_table

__all__ = ["collect_checks", "markdown"]

KINDS = ("all activations", "checkpointing")
# first, second, at most (without, with checkpointing), aim, floor by multiply-adds
STEPS = (
    ("sparse_peft exact", "peft lora", (1.45, 1.35), (1.33, 1.24), (1.29, 1.20)),
    ("sparse_peft lowrank", "peft lora", (1.12, 1.12), (1.04, 1.04), None),
    ("qa_sparse_peft exact", "peft lora", (1.50, 1.40), (1.36, 1.27), (1.29, 1.20)),
    ("sparse_peft exact", "published", (0.78, 0.78), (0.71, 0.71), (0.69, 0.67)),
)


def collect_checks(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Every aim; of ours the faster kernels count, as the default will be."""
    checks = []
    for first, second, most, aims, floors in STEPS:
        for place, kind in enumerate(KINDS):
            found = _quotient(_step(result, first, kind), _step(result, second, kind))
            floor = {} if floors is None else {"floor": floors[place]}
            name = f"{first} / {second}, step of Llama-3-8B, {kind}"
            checks.append(check(name, found, at_most=most[place], aim=aims[place], **floor))
    for kind in KINDS:
        found = _quotient(_peak(result, "sparse_peft exact", kind), _peak(result, "peft lora", kind))
        checks.append(check(f"peak memory, sparse_peft / PEFT LoRA, {kind}", found, at_most=1.05, aim=1.02))
    kind = "checkpointing"
    found = _quotient(_peak(result, "qa_sparse_peft exact", kind), _peak(result, "peft lora", kind))
    name = "peak memory, qa_sparse_peft on latents / PEFT LoRA on bf16, checkpointing"
    checks.append(check(name, found, at_most=0.80, aim=0.70))
    whole = _values(result, "compression", "wanda + gptq").get("whole_model_minutes")
    name = "compressing Llama-3-8B, Wanda + GPTQ, minutes (from four blocks)"
    checks.append(check(name, whole, at_most=20.0, aim=8.0))
    differing = _values(result, "facts", "merged codes").get("differing")
    checks.append(check("codes of a merge that differ between GPU and CPU", differing, at_most=0, aim=0))
    failed = _failed_tests(result)
    checks.append(check("tests marked gpu that fail", failed, at_most=0, aim=0))
    return checks


def markdown(result: dict[str, Any]) -> str:
    """Every part's table, then the aims."""
    lines = ["# Measured on a GPU" + (" (dry run: no figure means anything)" if result["dry"] else "")]
    for name, part in result["parts"].items():
        lines += ["", f"## {name}: {part['about']}", ""]
        lines += [_layers_table(result, part["rows"]), ""] if name == "layers" else []
        lines += [_part_table(part["rows"])] if part["rows"] else []
        lines += ["", f"**{part['error']}**"] if part["error"] else []
    return "\n".join([*lines, "", "## Aims", "", checks_table(result["checks"])])


def _layers_table(result: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Every variant of every layer."""
    rate = _values(result, "facts", "matrix rate").get("flops_per_second")
    lines = []
    for row in rows:
        values = row.get("values", {})
        for variant, milliseconds in values.get("ms", {}).items():
            speed, transient = values["tflops"][variant], values["transient_bytes"][variant]
            share = f"{speed * 1e12 / rate:.0%}" if rate else ""
            numbers = [f"{milliseconds:.3f}", f"{speed:.0f}", share, f"{transient / 2**20:.0f}"]
            lines.append([row["row"], variant, *numbers])
        lines += [
            [row["row"], variant, text, "", "", ""] for variant, text in values.get("failed", {}).items()
        ]
    return markdown_table(["layer", "variant", "ms", "TFLOP/s", "of the matrix rate", "transient MiB"], lines)


def _part_table(rows: list[dict[str, Any]]) -> str:
    """One line a row; what is nested or long stays in the JSON."""
    keys = list(dict.fromkeys(k for row in rows for k, v in row.get("values", {}).items() if _short(v)))
    if len(rows) <= 4 or len(keys) > 12:
        cells = [
            [row["row"], key, _cell(key, value)]
            for row in rows
            for key, value in (row.get("values") or {"error": row.get("error", "")}).items()
            if _short(value)
        ]
        return markdown_table(["row", "figure", "value"], cells)
    lines = [
        [row["row"], *(_cell(key, row.get("values", {}).get(key)) for key in keys), row.get("error", "")]
        for row in rows
    ]
    return markdown_table(["row", *(key.replace("_", " ") for key in keys), "error"], lines)


def _short(value: Any) -> bool:
    plain = isinstance(value, (int, float, str)) or value is None
    return plain or (isinstance(value, list) and all(isinstance(v, float) for v in value) and len(value) < 9)


def _cell(key: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return f"{statistics.median(value):.4g} ({min(value):.4g} to {max(value):.4g})" if value else ""
    if key.endswith("_bytes"):
        return f"{value / 2**30:.2f} GiB"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "/")


def _values(result: dict[str, Any], part: str, row: str) -> dict[str, Any]:
    rows = result["parts"].get(part, {}).get("rows", [])
    return next((found.get("values", {}) for found in rows if found["row"] == row), {})


def _kernels(name: str) -> list[str]:
    """The rows that stand for one method: with torch's operations and with the kernels."""
    return [f"{name} torch", f"{name} triton"] if "sparse_peft" in name else [name]


def _step(result: dict[str, Any], name: str, kind: str) -> float | None:
    """The median step of a method, by its faster kernels."""
    found = [_values(result, "training", f"{row}, {kind}").get("step_seconds") for row in _kernels(name)]
    return min((statistics.median(seconds) for seconds in found if seconds), default=None)


def _peak(result: dict[str, Any], name: str, kind: str) -> float | None:
    """The peak memory of a method, by its faster kernels."""
    rows = [_values(result, "training", f"{row}, {kind}") for row in _kernels(name)]
    measured = [row for row in rows if row.get("step_seconds")]
    if not measured:
        return None
    return float(min(measured, key=lambda row: statistics.median(row["step_seconds"]))["peak_bytes"])


def _quotient(first: float | None, second: float | None) -> float | None:
    return None if first is None or not second else first / second


def _failed_tests(result: dict[str, Any]) -> float | None:
    rows = result["parts"].get("tests", {}).get("rows", [])
    counts = [row["values"]["counts"] for row in rows if "values" in row]
    if not counts or len(counts) < len(rows):
        return None
    return float(sum(found.get(kind, 0) for found in counts for kind in ("failed", "error", "errors")))
