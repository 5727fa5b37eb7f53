"""Reference logits: what a model gave when it was certified."""

from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from sqft.artifacts import REFERENCE
from sqft.certificate.stored import StoredTensors
from sqft.errors import CertificateError

__all__ = [
    "compute_logits",
    "largest_difference",
    "read_reference",
    "reference_items",
    "write_reference",
]

POSITIONS = 4  # positions kept of every item: the last ones, which depend on the whole item
PROBE_LENGTH = 16

TokenIds = Sequence[Sequence[int]]


def write_reference(directory: Path, model: nn.Module, token_ids: TokenIds) -> None:
    """Store token ids and the logits that the model gives at the last positions of every item.

    model: opened from `directory`'s files, so that the logits are those of what was written. token_ids: items
    of any length; if there is none, a fixed walk through the vocabulary stands in.
    """
    items = reference_items(model, token_ids)
    tensors = {
        "token_ids": torch.tensor([token for item in items for token in item]),
        "lengths": torch.tensor([len(item) for item in items]),
        "logits": compute_logits(model, items).contiguous(),
    }
    save_file(tensors, directory / REFERENCE)


def reference_items(model: nn.Module, token_ids: TokenIds) -> list[list[int]]:
    """The items that are not empty; if there is none, a fixed walk through the vocabulary."""
    return [list(item) for item in token_ids if len(item)] or [_probe(model)]


def read_reference(directory: Path) -> tuple[list[list[int]], Float[Tensor, "positions vocabulary"]]:
    """The stored items and logits.

    Raises: CertificateError if they are missing or damaged.
    """
    stored = StoredTensors([directory / REFERENCE])
    token_ids, lengths = stored.raw("token_ids").tolist(), stored.raw("lengths").tolist()
    if sum(lengths) != len(token_ids):
        raise CertificateError(f"{directory / REFERENCE} is damaged: its lengths do not add up")
    ends = torch.tensor(lengths).cumsum(0).tolist()
    items = [token_ids[end - length : end] for length, end in zip(lengths, ends, strict=True)]
    return items, torch.from_numpy(stored.raw("logits").copy())


def compute_logits(model: nn.Module, token_ids: TokenIds) -> Float[Tensor, "positions vocabulary"]:
    """Float32 logits at the last positions of every item, one item at a time."""
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    with torch.no_grad():
        rows = [
            model(input_ids=torch.tensor([list(item)], device=device)).logits[0, -POSITIONS:].float().cpu()
            for item in token_ids
        ]
    model.train(training)
    return torch.cat(rows)


def largest_difference(logits: Tensor, expected: Tensor) -> float:
    """max |logits - expected| / max |expected|.

    Raises: CertificateError if the shapes differ.
    """
    if logits.shape != expected.shape:
        raise CertificateError(f"logits of shape {tuple(logits.shape)}, expected {tuple(expected.shape)}")
    return float((logits - expected).abs().max() / expected.abs().max())


def _probe(model: nn.Module) -> list[int]:
    vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    return [position * vocabulary // PROBE_LENGTH for position in range(PROBE_LENGTH)]
