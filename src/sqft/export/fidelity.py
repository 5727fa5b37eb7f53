"""How faithful an artefact is: its codes against the trained ones, its runtime's logits against float32."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor

from sqft.artifacts import REFERENCE
from sqft.errors import ExportError
from sqft.formats.weights import ExportSource, IntegerWeight
from sqft.models import load_model
from sqft.runtimes.hf import run_model

__all__ = [
    "CodeComparison",
    "LogitComparison",
    "compare_codes",
    "compare_logits",
    "probe_items",
    "reference_logits",
]

MAX_POSITIONS = 32
PROBE_LENGTH = 16


@dataclass(frozen=True)
class CodeComparison:
    """codes: integer weights compared; changed: of them different; weights_changed: of the plain weights."""

    codes: int
    changed: int
    weights: int
    weights_changed: int


@dataclass(frozen=True)
class LogitComparison:
    """Against float32 on the dequantized model, over `positions` positions.

    largest_share: largest logit difference / largest logit; None where a runtime gives probabilities only.
    kl: mean KL divergence in nats. top1: share of positions with the same most likely token.
    """

    runtime: str
    positions: int
    largest_share: float | None
    kl: float
    top1: float


def compare_codes(
    source: ExportSource, stored: Iterable[tuple[str, IntegerWeight | Tensor]]
) -> CodeComparison:
    """Compare what stands in an artefact with what was trained, weight by weight.

    Raises: ExportError if a weight of the model is not among them.
    """
    codes = changed = weights = weights_changed = 0
    seen = set[str]()
    for name, found in stored:
        seen.add(name)
        if isinstance(found, IntegerWeight):
            expected = IntegerWeight.of(source.quantized(name.removesuffix(".weight")))
            codes += expected.steps.size
            changed += expected.changed(found)
        else:
            plain = source.tensor(name).float()
            weights += plain.numel()
            weights_changed += int((plain != found.float()).sum())
    tied = source.checkpoint.tied_weights
    needed = (n for n in source.tensor_names() if n not in tied and not n.endswith("rotary_emb.inv_freq"))
    lacking = [name for name in needed if name not in seen]
    if lacking:
        raise ExportError(f"{len(lacking)} weights of the model are not in the artefact, first {lacking[0]}")
    return CodeComparison(codes, changed, weights, weights_changed)


def compare_logits(
    runtime: str,
    found: Float[Tensor, "positions vocabulary"],
    expected: Tensor,
    *,
    probabilities: bool = False,
) -> LogitComparison:
    """Compare a runtime's logits (or log probabilities) with the reference's logits."""
    expected = expected.float()
    share = None if probabilities else float((found - expected).abs().max() / expected.abs().max())
    log_p, log_q = expected.log_softmax(-1), found.float().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q.clamp_min(-1e4))).sum(-1).mean()
    top1 = (expected.argmax(-1) == found.argmax(-1)).float().mean()
    return LogitComparison(runtime, len(expected), share, max(float(kl), 0.0), float(top1))


def probe_items(source: ExportSource) -> list[list[int]]:
    """Token ids to compare on: those of the model's stored reference, else a walk through the vocabulary."""
    path = source.directory / REFERENCE
    items: list[list[int]] = []
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            if "lengths" in file.keys():  # noqa: SIM118
                lengths = file.get_tensor("lengths").tolist()
                items = [item.tolist() for item in file.get_tensor("token_ids").split(lengths)]
    if not items:
        vocabulary = int(source.config["vocab_size"])
        items = [[position * vocabulary // PROBE_LENGTH for position in range(PROBE_LENGTH)]]
    kept, room = [], MAX_POSITIONS
    for item in items:
        if room > 0:
            kept.append(item[:room])
            room -= len(kept[-1])
    return kept


def reference_logits(
    directory: Path, items: Sequence[Sequence[int]]
) -> Float[Tensor, "positions vocabulary"]:
    """What the model of a directory says in float32 on its dequantized weights."""
    return run_model(load_model(directory, dtype=torch.float32), items)
