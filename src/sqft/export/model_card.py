"""The README.md of an artefact: what it is, what it was made of, what was checked, how to serve it."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sqft.export.exporting import ExportResult

__all__ = ["model_card"]

CERTIFICATE = "sqft_certificate.json"


def model_card(
    result: "ExportResult",
    source_dir: Path,
    *,
    recipe: dict[str, Any] | None = None,
    evaluation: list[dict[str, Any]] | None = None,
) -> str:
    """Markdown with lineage, certificate, fidelity, types, serving, recipe and evaluation."""
    parts = [
        "---\nlibrary_name: sqft\ntags: [sqft, sparse, int4]\n---",
        f"# {result.directory.name}",
        f"A fine-tuned model merged by sqft, in the format `{result.format}`: {_codes(result)}.",
        "## Types of the tensors",
        "\n".join(f"- {count} x {kind}" for kind, count in sorted(result.tensor_types.items())),
        f"Embedding and head: {result.head_type}.",
        "## Fidelity",
        _fidelity(result),
        "## Serving",
        "```\n" + "\n".join(result.serve) + "\n```",
        *_lineage(source_dir),
    ]
    if recipe:
        parts += ["## Recipe", "```json\n" + json.dumps(recipe, indent=1) + "\n```"]
    if evaluation:
        keys = [key for key in evaluation[0] if not isinstance(evaluation[0][key], (dict, list))]
        rows = [" | ".join(_cell(row.get(key)) for key in keys) for row in evaluation]
        parts += ["## Evaluation", "| " + " | ".join(keys) + " |\n|" + "---|" * len(keys)]
        parts[-1] += "".join(f"\n| {row} |" for row in rows)
    return "\n\n".join(parts) + "\n"


def _codes(result: "ExportResult") -> str:
    compared = result.code_comparison
    if result.damage is not None:
        return (
            f"moved to another grid ({result.damage.grid}), {result.damage.changed} of "
            f"{result.damage.weights} weights changed, relative error {result.damage.relative_error:.4f}"
        )
    return (
        f"{compared.changed} of {compared.codes} codes and {compared.weights_changed} of {compared.weights} "
        "other weights changed"
    )


def _fidelity(result: "ExportResult") -> str:
    logits = result.logit_comparison
    if logits is None:
        return (
            "Not run: no runtime of this format runs where it was written. Its fields were checked instead."
        )
    share = "" if logits.largest_share is None else f"largest logit difference {logits.largest_share:.1e}, "
    return (
        f"In {logits.runtime}, against float32 on the dequantized weights, {logits.positions} positions: "
        f"{share}KL {logits.kl:.2e} nats, same most likely token {logits.top1:.1%}."
    )


def _lineage(source_dir: Path) -> list[str]:
    path = source_dir / CERTIFICATE
    if not path.is_file():
        return ["## Lineage", "The model that was exported carries no certificate."]
    certificate = json.loads(path.read_text(encoding="utf-8"))
    passed = [check["name"] for check in certificate.get("checks", []) if check["passed"]]
    failed = [check["name"] for check in certificate.get("checks", []) if not check["passed"]]
    lines = ["sha256 of the files from base to merged model:"]
    for part in ("base", "adapter"):
        for name, digest in sorted(certificate.get("lineage", {}).get(part, {}).items()):
            if name.endswith(".safetensors"):
                lines.append(f"- {part}/{name} `{digest}`")
    for name, digest in sorted(certificate.get("files", {}).items()):
        if name.endswith(".safetensors"):
            lines.append(f"- merged/{name} `{digest}`")
    summary = f"passed: {', '.join(passed) or 'none'}; failed: {', '.join(failed) or 'none'}"
    return ["## Lineage", "\n".join(lines), "## Certificate of the merged model", summary]


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
