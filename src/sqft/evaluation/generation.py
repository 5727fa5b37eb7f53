"""Greedy answers, in batches padded on the left."""

from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from sqft.data import Example
from sqft.data.batches import pad_left
from sqft.evaluation.scoring import Runtime, Scorable, evaluating
from sqft.progress import SILENT, Progress

__all__ = ["generate_answers", "normalize"]


def normalize(text: str) -> str:
    """Text without regard to case and spacing."""
    return " ".join(text.casefold().split())


def generate_answers(
    model: Scorable,
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 64,
    progress: Progress = SILENT,
) -> list[str]:
    """The most likely next token, again and again, until the end token or the end of the line.

    An answer also ends where it can no longer become the expected one, which changes no match and spares an
    untuned model's chatter.
    """
    answers = [""] * len(examples)
    order = sorted(range(len(examples)), key=lambda index: -len(examples[index].prompt_ids))
    with evaluating(model), progress.task("answers", len(examples)) as advance:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            texts = _generate(model, [examples[index] for index in batch], tokenizer, max_new_tokens)
            for index, text in zip(batch, texts, strict=True):
                answers[index] = text
            advance(len(batch))
    return answers


def _generate(
    model: Scorable, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> list[str]:
    if not isinstance(model, nn.Module):
        return [_generate_one(model, example, tokenizer, max_new_tokens) for example in examples]
    device = next(model.parameters()).device
    step_ids, mask = (part.to(device) for part in pad_left([example.prompt_ids for example in examples]))
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    answers = [_Answer(example.answer, tokenizer) for example in examples]
    cache = None
    for _ in range(max_new_tokens):
        outputs = model(
            input_ids=step_ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache = outputs.past_key_values
        step_ids = outputs.logits[:, -1].argmax(dim=-1, keepdim=True)
        for answer, token in zip(answers, step_ids[:, 0].tolist(), strict=True):
            answer.add(token)
        if all(answer.done for answer in answers):
            break
        mask = torch.cat([mask, mask.new_ones(len(examples), 1)], dim=1)
        positions = positions[:, -1:] + 1
    return [answer.text for answer in answers]


def _generate_one(
    runtime: Runtime, example: Example, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> str:
    answer = _Answer(example.answer, tokenizer)
    for count, token in enumerate(runtime.greedy(example.prompt_ids), start=1):
        answer.add(token)
        if answer.done or count == max_new_tokens:
            break
    return answer.text


class _Answer:
    """One answer as it grows."""

    def __init__(self, expected: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.expected = normalize(expected)
        self.lines = "\n" in expected.strip()
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""
        self.done = False

    def add(self, token: int) -> None:
        if self.done:
            return
        if token == self.tokenizer.eos_token_id:
            self.done = True
            return
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not self.lines and "\n" in text.lstrip():
            text = text[: len(text) - len(text.lstrip())] + text.lstrip().split("\n", 1)[0]
            self.done = True
        self.text = text
        settled = text.rstrip("\ufffd")  # a character may be spread over up to four tokens
        if len(text) - len(settled) > 3:
            settled = text
        self.done = self.done or not self.expected.startswith(normalize(settled))
