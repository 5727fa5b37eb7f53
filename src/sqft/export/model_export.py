"""Exporting one model to one format: refuse or write, read back, run, and say what was found."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sqft.artifacts import EXPORT_RECORD, digest_files, seal, write_json
from sqft.directories import check_destination, new_directory
from sqft.errors import ExportError
from sqft.export.fidelity import (
    CodeComparison,
    LogitComparison,
    compare_codes,
    compare_logits,
    probe_items,
    reference_logits,
)
from sqft.export.model_card import model_card
from sqft.export.records import model_records, read_certificate
from sqft.export.requantization import Damage, requantize_source, rounding_damage
from sqft.export.result import ExportResult
from sqft.export.table import FORMATS, Format, find_format, require_runtime
from sqft.formats.gguf_model import HEAD_TYPES, head_names, round_head
from sqft.formats.weights import ExportSource, IntegerWeight, open_source
from sqft.progress import SILENT, Progress
from sqft.runtimes.commands import serving_commands

__all__ = [
    "ExportPlan",
    "check_stored",
    "export_model",
    "formats_that_hold",
    "plan_export",
    "write_export",
]

LARGEST_SHARE = 1e-4  # of the largest logit, for runtimes that compute in float32
LARGEST_KL = 0.02  # nats, for llama.cpp, which rounds activations to 8 bits


@dataclass(frozen=True)
class ExportPlan:
    """A model that a format can hold: what is to be written, and what another grid did to it.

    trained: the model as it is; source: as the format holds it, the same unless damage says otherwise.
    """

    format: str
    trained: ExportSource
    source: ExportSource
    damage: Damage | None
    head_type: str


def export_model(
    directory: Path,
    format: str,
    output_dir: Path,
    *,
    allow_requantize: bool = False,
    head_type: str = "auto",
    recipe: dict[str, Any] | None = None,
    evaluation: list[dict[str, Any]] | None = None,
    probes: Sequence[Sequence[int]] | None = None,
    progress: Progress = SILENT,
) -> ExportResult:
    """Write a model in a format, reopen it in the format's runtime, and compare codes and logits.

    head_type: gguf only: the type of embedding and head, auto (exact), f16, bf16, f32 or q8_0.
    allow_requantize: where the format cannot hold the grid, round to one that it can, and report the damage.
    recipe, evaluation, probes: as `write_export` takes them.

    Raises: ExportError if the format is unknown or cannot hold the model exactly, if writing would destroy
    something else, or if what was written is not what was trained; MissingExtraError if the runtime that
    must check it is not installed.
    """
    find_format(format)
    check_destination(output_dir, directory)
    plan = plan_export(directory, format, allow_requantize=allow_requantize, head_type=head_type)
    with new_directory(output_dir) as partial:
        return write_export(
            plan,
            partial,
            final=output_dir,
            recipe=recipe,
            evaluation=evaluation,
            probes=probes,
            progress=progress,
        )


def plan_export(
    directory: Path, format: str, *, allow_requantize: bool = False, head_type: str = "auto"
) -> ExportPlan:
    """Refuse what a format cannot hold before anything is written.

    Raises: ExportError if the format is unknown or cannot hold the model; MissingExtraError if the runtime
    that must check it is not installed.
    """
    find_format(format)
    if head_type not in HEAD_TYPES:
        raise ExportError(f"head type '{head_type}' is unknown; choose from {', '.join(HEAD_TYPES)}")
    if head_type != "auto" and format != "gguf":
        raise ExportError(f"a head type is for gguf only; {format} keeps the head as it is, leave it at auto")
    require_runtime(format)
    trained = open_source(directory)
    source, damage = _fit(trained, format, allow_requantize)
    return ExportPlan(format, trained, source, damage, head_type)


def write_export(
    plan: ExportPlan,
    directory: Path,
    *,
    final: Path,
    recipe: dict[str, Any] | None = None,
    evaluation: list[dict[str, Any]] | None = None,
    probes: Sequence[Sequence[int]] | None = None,
    progress: Progress = SILENT,
) -> ExportResult:
    """Fill an empty directory, which will be called `final`, and compare what lies there with the model.

    recipe, evaluation: go into the model card; default what the model's records tell. probes: items of token
    ids to compare logits on; default the first few of the model's stored reference.

    Raises: ExportError if what was written is not what was trained.
    """
    format, source, damage = plan.format, plan.source, plan.damage
    target = FORMATS[format]
    with progress.task(f"export {format}", 4) as advance:
        kinds = target.write(source, directory, plan.head_type)
        advance(1)
        codes = check_stored(source, directory, format, head_type=plan.head_type, rounded=damage is not None)
        advance(1)
        items = probes or probe_items(plan.trained)
        logits = _compare_logits(plan.trained, source, target, directory, items)
        if damage is None:
            _check_logits(format, logits)
        advance(1)
        file = next((path.name for path in directory.glob("*.gguf")), None)
        result = ExportResult(
            format=format,
            directory=final,
            size_bytes=sum(path.stat().st_size for path in directory.iterdir()),
            tensor_types=dict(Counter(kinds.values())),
            head_type=_head_type(kinds),
            code_comparison=codes,
            logit_comparison=logits,
            damage=damage,
            serve=serving_commands(format, final, file),
        )
        own_recipe, own_evaluation = model_records(plan.trained.directory)
        card = model_card(
            result,
            certificate=read_certificate(plan.trained.directory),
            recipe=recipe or own_recipe,
            evaluation=evaluation or own_evaluation,
        )
        (directory / "README.md").write_text(card, encoding="utf-8")
        record = {"head_option": plan.head_type, "files": digest_files(directory)}
        write_json(directory / EXPORT_RECORD, seal(result.as_dict() | record))
        advance(1)
    return result


def check_stored(
    source: ExportSource, directory: Path, format: str, *, head_type: str = "auto", rounded: bool = False
) -> CodeComparison:
    """Read an artefact back and compare it with the model, weight by weight.

    head_type: embedding and head must be this rounding of the model's, everything else equal.
    rounded: the plain weights were rounded to the format on purpose, so they may differ.

    Raises: ExportError if a code or weight is another one.
    """
    heads = head_names(source) if head_type != "auto" else set()
    in_heads = 0

    def stored() -> Iterator[tuple[str, IntegerWeight | Tensor]]:
        nonlocal in_heads
        for name, found in FORMATS[format].read(source, directory):
            if name in heads and isinstance(found, Tensor):
                own = source.tensor(name)
                if not torch.equal(round_head(own, head_type).float(), found.float()):
                    raise ExportError(f"{name} is not the model's, rounded to {head_type}")
                in_heads += int((own.float() != found.float()).sum())
            yield name, found

    compared = compare_codes(source, stored())
    if compared.changed:
        raise ExportError(f"{compared.changed} of {compared.codes} codes differ from the model's")
    if compared.weights_changed > in_heads and not rounded:
        elsewhere = f"{compared.weights_changed - in_heads} of {compared.weights} weights"
        raise ExportError(f"{elsewhere} differ from the model's")
    return compared


def formats_that_hold(source: ExportSource) -> list[str]:
    """The formats that hold a model exactly."""
    return [name for name, target in FORMATS.items() if target.refusal(source) is None]


def _fit(source: ExportSource, format: str, allow_requantize: bool) -> tuple[ExportSource, Damage | None]:
    """The source as the format can hold it, and what that cost."""
    target = FORMATS[format]
    reason = target.refusal(source)
    if reason is None:
        return source, None
    can = ", ".join(formats_that_hold(source)) or "none"
    if not allow_requantize:
        raise ExportError(f"{format} cannot hold {reason}; formats that can: {can}; or allow requantizing")
    if target.grid is not None and source.quantized_names:
        widths = {source.quantized(name).codes.shape[1] for name in source.quantized_names}
        if all(width % target.grid.group_size == 0 for width in widths):
            fitted, damage = requantize_source(source, target.grid)
            if target.refusal(fitted) is None:
                return fitted, damage
    if format == "safetensors":
        return source, rounding_damage(source)
    raise ExportError(f"{format} cannot hold {reason}, requantized or not; formats that can: {can}")


def _compare_logits(
    trained: ExportSource,
    source: ExportSource,
    target: Format,
    directory: Path,
    items: Sequence[Sequence[int]],
) -> LogitComparison | None:
    if target.run is None:
        return None
    expected = reference_logits(trained.directory, items)
    found = target.run(source, directory, items)
    return compare_logits(target.runtime, found, expected, probabilities=target.gives_probabilities)


def _check_logits(format: str, logits: LogitComparison | None) -> None:
    if logits is None:
        return
    if logits.largest_share is not None and not logits.largest_share <= LARGEST_SHARE:
        raise ExportError(
            f"{logits.runtime} differs from float32 by {logits.largest_share:.1e} of the largest logit "
            f"(allowed {LARGEST_SHARE:.0e}); {format} was not written"
        )
    if not logits.kl <= LARGEST_KL:
        raise ExportError(
            f"{logits.runtime} differs from float32 by a KL of {logits.kl:.3f} nats (allowed {LARGEST_KL}); "
            f"{format} was not written"
        )


def _head_type(kinds: dict[str, str]) -> str:
    heads = ("token_embd.weight", "output.weight", "model.embed_tokens.weight", "lm_head.weight")
    found = [f"{name} {kinds[name]}" for name in heads if name in kinds]
    return ", ".join(found) or "not stated"
