"""The README.md of an artefact: what it is, what it was made of, what was checked, how to serve it."""

import json
from pathlib import Path
from typing import Any

from sqft.export.result import ExportResult

__all__ = ["adapter_card", "model_card"]

Rows = list[dict[str, Any]]


def model_card(
    result: ExportResult,
    *,
    certificate: dict[str, Any] | None,
    recipe: dict[str, Any] | None = None,
    evaluation: Rows | None = None,
) -> str:
    """Markdown with lineage, certificate, fidelity, types, serving, recipe and evaluation.

    certificate: the one that the exported model carries, if any.
    """
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
        "```\n" + "\n".join(result.commands) + "\n```",
        *_lineage(certificate),
    ]
    if recipe:
        parts += ["## Recipe", "```json\n" + _plain_json(_without_folders(recipe)) + "\n```"]
    if evaluation:
        parts += ["## Evaluation", _table(evaluation)]
    return "\n\n".join(parts) + "\n"


def adapter_card(directory: Path, files: dict[str, str], serve: list[str]) -> str:
    """Markdown of an adapter that stays unmerged: its lineage and how to serve it."""
    digests = "\n".join(f"- {name} `{digest}`" for name, digest in sorted(files.items()))
    parts = [
        "---\nlibrary_name: peft\ntags: [sqft, lora]\n---",
        f"# {directory.name}",
        "A plain LoRA adapter, unmerged. Read back and compared with the trained factors; not run.",
        "## Serving",
        "```\n" + "\n".join(serve) + "\n```",
        "## Lineage",
        f"sha256 of what it was made of:\n{digests}",
    ]
    return "\n\n".join(parts) + "\n"


def _plain_json(value: Any) -> str:
    """JSON that ends no block of code and begins no HTML, whatever texts it holds."""
    text = json.dumps(value, indent=1)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("`", "\\u0060")


def _without_folders(value: Any) -> Any:
    """Values in which a path on this machine is the name at its end."""
    if isinstance(value, dict):
        return {key: _without_folders(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_folders(inner) for inner in value]
    local = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return Path(value).name if local else value


def _table(rows: Rows) -> str:
    """Markdown with a column for every figure that some row has, the name first."""
    flat = [{k: v for key, value in row.items() for k, v in _columns(key, value)} for row in rows]
    keys = sorted(dict.fromkeys(key for row in flat for key in row), key=lambda key: key != "name")
    head = "| " + " | ".join(keys) + " |\n|" + "---|" * len(keys)
    return head + "".join("\n| " + " | ".join(_cell(row.get(k)) for k in keys) + " |" for row in flat)


def _columns(key: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return list(value.items())
    return [] if value is None or isinstance(value, list) else [(key, value)]


def _codes(result: ExportResult) -> str:
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


def _fidelity(result: ExportResult) -> str:
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


def _lineage(certificate: dict[str, Any] | None) -> list[str]:
    if certificate is None:
        return ["## Lineage", "The model that was exported carries no certificate."]
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
    text = "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return text.replace("|", "\\|").replace("<", "&lt;")
