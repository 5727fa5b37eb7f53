"""Wraps models in the interface of lm-evaluation-harness, with progress reports."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from sqft.errors import DataError, require
from sqft.evaluation.scoring import Row, Runtime, Scorable, score_rows
from sqft.progress import Progress

__all__ = ["wrap_model"]


def wrap_model(
    model: Scorable, tokenizer: PreTrainedTokenizerBase, *, batch_size: int, progress: Progress
) -> Any:
    """An `lm_eval.api.model.LM`: the harness's own for a module, ours for what another program runs."""
    if isinstance(model, nn.Module):
        return _transformers_model(model, tokenizer, batch_size, progress)
    return _runtime_model(model, tokenizer, progress)


def _transformers_model(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, batch_size: int, progress: Progress
) -> Any:
    huggingface = require("lm_eval.models.huggingface", "eval")

    class Model(huggingface.HFLM):  # type: ignore[misc, name-defined]
        """The harness's model for transformers, with our progress in place of its bars."""

        _advance: Callable[[int], None] | None = None

        @contextmanager
        def _told(self, description: str, requests: Sequence[Any]) -> Iterator[None]:
            if self._advance is not None or not requests:  # a window of a longer text, told already
                yield
                return
            with progress.task(description, len(requests)) as advance:
                self._advance = advance
                try:
                    yield
                finally:
                    self._advance = None

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self._told("texts", requests):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            with self._told("choices", requests):
                return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with self._told("answers", requests):
                return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *rest: Any, **named: Any) -> Any:
            if self._advance is not None:
                self._advance(len(inps))
            return super()._model_call(inps, *rest, **named)

        def _model_generate(self, context: Any, *rest: Any, **named: Any) -> Any:
            if self._advance is not None:
                self._advance(len(context))
            return super()._model_generate(context, *rest, **named)

    return Model(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)


def _runtime_model(runtime: Runtime, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> Any:
    base = require("lm_eval.api.model", "eval")
    windows = require("lm_eval.utils", "eval")

    class Model(base.TemplateLM):  # type: ignore[misc, name-defined]
        """A model that another program runs: greedy answers and log-probabilities, one item at a time."""

        tokenizer_name = type(tokenizer).__name__

        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = tokenizer

        @property
        def eot_token_id(self) -> int:
            return int(tokenizer.eos_token_id)

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
            return list(tokenizer(string, **options)["input_ids"])

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            rows = [_row(context, answer) for _, context, answer in requests]
            scores = score_rows(runtime, rows, description="choices", progress=progress)
            return [(sum(values), _is_greedy(runtime, row)) for values, row in zip(scores, rows, strict=True)]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            sums = []
            for (text,) in (request.args for request in requests):
                pieces = windows.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.eot_token_id,
                    max_seq_len=runtime.max_length,
                    context_len=1,
                )
                rows = [_row(*windows.make_disjoint_window(piece)) for piece in pieces]
                scores = score_rows(runtime, rows, description="texts", progress=progress)
                sums.append(sum(map(sum, scores)))
            return sums

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers = []
            with progress.task("answers", len(requests)) as advance:
                for context, settings in (request.args for request in requests):
                    answers.append(_generate(runtime, tokenizer, self.tok_encode(context), settings))
                    advance(1)
            return answers

        def apply_chat_template(self, chat_history: Any, add_generation_prompt: bool = True) -> str:
            return str(
                tokenizer.apply_chat_template(
                    chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
                )
            )

    return Model()


def _row(context: Sequence[int], answer: Sequence[int]) -> Row:
    first = len(context) - 1
    return Row((*context, *answer[:-1]), [(first + place, int(token)) for place, token in enumerate(answer)])


def _is_greedy(runtime: Runtime, row: Row) -> bool:
    """Whether this answer is the model's greedy one."""
    start = row.wanted[0][0] + 1
    answer = [token for _, token in row.wanted]
    return all(
        token == own for token, own in zip(answer, runtime.greedy(list(row.ids[:start])), strict=False)
    )


def _generate(
    runtime: Runtime, tokenizer: PreTrainedTokenizerBase, prompt: list[int], settings: dict[str, Any]
) -> str:
    """The greedy answer up to the end token or one of the texts that end it.

    Raises: DataError for a way of decoding that a runtime does not have.
    """
    if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
        raise DataError(
            "this task generates by sampling or beam search, which only a model that transformers runs can do"
        )
    until = settings.get("until") or []
    stops = [until] if isinstance(until, str) else list(until)
    room = int(settings.get("max_gen_toks", settings.get("max_new_tokens", 256)))
    prompt = prompt[-(runtime.max_length - room) :]
    ids: list[int] = []
    text = ""
    for token in runtime.greedy(prompt):
        if token == tokenizer.eos_token_id:
            break
        ids.append(token)
        text = tokenizer.decode(ids, skip_special_tokens=True)
        ends = [text.index(stop) for stop in stops if stop and stop in text]
        if ends:
            return text[: min(ends)]
        if len(ids) >= room:
            break
    return text
