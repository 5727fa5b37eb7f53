"""What a teacher predicts, kept on disk: the k most likely tokens of each place, and the rest's mass."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from sqft.artifacts import digest_json
from sqft.data import Example
from sqft.data.batches import pad_right
from sqft.data.items import LossOn
from sqft.errors import ModelError, TrainingError
from sqft.models.forward import logits_at
from sqft.ops.distillation import top_log_probs
from sqft.progress import SILENT, Progress

__all__ = ["Predictions", "Teacher", "check_same_tokens", "predict_items", "predict_texts"]

LOWEST = -1e4  # of a log-probability in float16
BATCH_TOKENS = 512  # of a forward pass


@dataclass(frozen=True)
class Predictions:
    """What a teacher predicts for some token sequences, of each those tokens that count.

    starts: where each sequence's tokens begin in the two others, and the end of the last. The last column of
    log_probs is of all tokens that are not among `ids`.
    """

    starts: Int[Tensor, " sequences_and_end"]
    ids: Int[Tensor, "tokens k"]
    log_probs: Float[Tensor, "tokens outcomes"]

    def of(self, sequences: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The ids and log-probabilities of some sequences, one after the other."""
        rows = torch.cat([torch.arange(*self.starts[i : i + 2].tolist()) for i in sequences])
        return self.ids[rows], self.log_probs[rows]


@dataclass(frozen=True)
class Teacher:
    """Everything that a training learns from a teacher.

    name: the identity of the model that predicted. items: for the training items, in their order; item_digest
    tells which these are. texts: for text_tokens, (sequences, length), all but the first token of each.
    """

    name: str
    items: Predictions | None = None
    item_digest: str = ""
    texts: Predictions | None = None
    text_tokens: Tensor | None = None

    def check_items(self, examples: Sequence[Example], loss_on: LossOn) -> None:
        """Raises: TrainingError if the teacher predicted for other items than these."""
        if self.items is None or self.item_digest != _digest(examples, loss_on):
            raise TrainingError(
                "the teacher's predictions are for other items than those that are trained on; remove "
                "them and let the teacher predict anew"
            )

    @property
    def digest(self) -> str:
        """Changes with whatever a training sees of the teacher."""
        texts = [] if self.text_tokens is None else self.text_tokens.tolist()
        width = [p.ids.shape[1] for p in (self.items, self.texts) if p is not None]
        return digest_json([self.name, self.item_digest, texts, width])

    def save(self, path: Path) -> None:
        """Write everything into one file."""
        tensors: dict[str, Tensor] = {}
        for part, found in (("items", self.items), ("texts", self.texts)):
            if found is not None:
                tensors |= {
                    f"{part}.starts": found.starts,
                    f"{part}.ids": found.ids,
                    f"{part}.log_probs": found.log_probs,
                }
        if self.text_tokens is not None:
            tensors["texts.tokens"] = self.text_tokens.to(torch.int32)
        save_file(tensors, path, metadata={"teacher": self.name, "items": self.item_digest})

    @classmethod
    def load(cls, path: Path, *, name: str) -> "Teacher":
        """Read what `save` wrote. name: the teacher that is asked for.

        Raises: TrainingError if the file is of another teacher, or damaged.
        """
        try:
            with safe_open(path, framework="pt") as file:
                facts = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise TrainingError(f"{path} cannot be read ({error}); remove it and run again") from None
        if facts.get("teacher") != name:
            raise TrainingError(
                f"{path} holds the predictions of another teacher; remove it and let this one predict"
            )
        fields = ("starts", "ids", "log_probs")
        parts = {
            part: Predictions(*(tensors[f"{part}.{field}"] for field in fields))
            for part in ("items", "texts")
            if f"{part}.ids" in tensors
        }
        tokens = tensors.get("texts.tokens")
        return cls(
            name,
            parts.get("items"),
            facts.get("items", ""),
            parts.get("texts"),
            None if tokens is None else tokens.long(),
        )


def predict_items(
    model: nn.Module,
    examples: Sequence[Example],
    *,
    top_k: int,
    vocab_size: int,
    loss_on: LossOn = "answer",
    progress: Progress = SILENT,
) -> tuple[Predictions, str]:
    """A teacher's predictions of the counted tokens of every item, and which items these are.

    vocab_size: the student's; a teacher may have more logits than that, which stand for no token.

    Raises: TrainingError for a top_k that is not below vocab_size; ModelError if the logits are not numbers.
    """
    rows = [(example.token_ids, example.counted(loss_on)) for example in examples]
    found = _predict(model, rows, top_k, vocab_size, "teacher on items", progress)
    return found, _digest(examples, loss_on)


def predict_texts(
    model: nn.Module,
    tokens: Int[Tensor, "sequences length"],
    *,
    top_k: int,
    vocab_size: int,
    progress: Progress = SILENT,
) -> Predictions:
    """A teacher's predictions of all tokens of every sequence but its first; else as `predict_items`."""
    rows = [(row, list(range(1, len(row)))) for row in tokens.tolist()]
    return _predict(model, rows, top_k, vocab_size, "teacher on texts", progress)


def check_same_tokens(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, name: str) -> None:
    """Raises: ModelError if a token of the student's means another one, or none, to the teacher."""
    known, other = student.get_vocab(), teacher.get_vocab()
    strange = next((token for token, number in known.items() if other.get(token) != number), None)
    if strange is not None:
        raise ModelError(
            f"distillation.teacher: {name} has another tokenizer (it has {other.get(strange)} where the "
            f"model has {known[strange]} for {strange!r}); a teacher must have the model's own"
        )


def _predict(
    model: nn.Module,
    rows: Sequence[tuple[Sequence[int], list[int]]],
    top_k: int,
    vocab_size: int,
    description: str,
    progress: Progress,
) -> Predictions:
    """The predictions of (token ids, places of counted tokens) of every row; the longest rows go first."""
    if top_k >= vocab_size:
        raise TrainingError(f"distillation.top_k: {top_k} of a vocabulary of {vocab_size}; make it smaller")
    starts = torch.tensor([0, *(len(places) for _, places in rows)]).cumsum(0)
    ids = torch.empty((int(starts[-1]), top_k), dtype=torch.int32)
    log_probs = torch.empty((int(starts[-1]), top_k + 1), dtype=torch.float16)
    model.eval()
    with torch.no_grad(), progress.task(description, len(rows)) as advance:
        for batch in _batches([len(row) for row, _ in rows]):
            positions = [place - 1 for i in batch for place in rows[i][1]]
            logits, column = logits_at(model, *pad_right([rows[i][0] for i in batch]), positions)
            for number, i in enumerate(batch):
                there = torch.tensor([column[place - 1] for place in rows[i][1]], device=logits.device)
                part = slice(int(starts[i]), int(starts[i + 1]))
                found = top_log_probs(logits[number, there, :vocab_size], top_k)
                ids[part] = found[0].to(ids)
                log_probs[part] = found[1].clamp(min=LOWEST).to(log_probs)
            advance(len(batch))
    if not torch.isfinite(log_probs).all():
        raise ModelError("the teacher's predictions are not finite numbers; its weights are damaged")
    return Predictions(starts, ids, log_probs)


def _batches(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of rows of like length, of some BATCH_TOKENS each."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if not batches or lengths[batches[-1][0]] * (len(batches[-1]) + 1) > BATCH_TOKENS:
            batches.append([])
        batches[-1].append(index)
    return batches


def _digest(examples: Sequence[Example], loss_on: LossOn) -> str:
    return digest_json([loss_on, [[e.prompt_ids, e.answer_ids, e.earlier_answers] for e in examples]])
