"""Records to token ids: prompt, answer and, for multiple choice, every choice."""

from collections.abc import Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from transformers import PreTrainedTokenizerBase

from sqft.data.items import Example
from sqft.data.records import Record
from sqft.errors import DataError
from sqft.sections import DataSection

__all__ = ["PromptFormat"]


@dataclass(frozen=True)
class PromptFormat:
    """A data section's format strings, applied with one tokenizer.

    With `choices`, the answer's format string is applied once for each choice, which stands in for the
    field `answer`; a list is written out, separated by commas, and `{choices[0]}` takes one entry of it.
    """

    section: DataSection
    tokenizer: PreTrainedTokenizerBase

    def __post_init__(self) -> None:
        for key in ("prompt", "answer"):
            fields_of(getattr(self.section, key), key)
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token, so a model cannot learn where to stop")
        if self.section.template == "chat" and not self.tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; write data.template: plain")

    def example(self, record: Record) -> Example | None:
        """The record as an Example, or None where a field it needs is null, or the answer is empty.

        Raises: DataError, with path and line, for a missing field or a label that fits no choice.
        """
        section = self.section
        if section.choices is None:
            prompt, answer = (self._fill(key, record, record.fields) for key in ("prompt", "answer"))
            if prompt is None or not answer:
                return None
            prompt_ids = self._prompt_ids(prompt, record)
            return Example(prompt, answer, prompt_ids, self._finished(prompt, prompt_ids, answer))
        choices = self._field(record, section.choices)
        label = self._field(record, section.label)
        prompt = self._fill("prompt", record, record.fields)
        if choices is None or label is None or prompt is None:
            return None
        self._check_choices(choices, label, record)
        texts = [self._fill("answer", record, {**record.fields, "answer": choice}) for choice in choices]
        if any(not text for text in texts):
            return None
        prompt_ids = self._prompt_ids(prompt, record)
        answers = [str(text) for text in texts]
        return Example(
            prompt,
            answers[label],
            prompt_ids,
            self._finished(prompt, prompt_ids, answers[label]),
            tuple(self._answer_ids(prompt, prompt_ids, text) for text in answers),
            label,
        )

    def _field(self, record: Record, name: str) -> Any:
        if name not in record.fields:
            raise DataError(
                f"{record.place}: no field {name!r}; it has {', '.join(map(repr, record.fields))}"
            )
        return record.fields[name]

    def _fill(self, key: str, record: Record, values: Mapping[str, Any]) -> str | None:
        text: str = getattr(self.section, key)
        used: dict[str, Any] = {}
        for name in fields_of(text, key):
            value = values[name] if name in values else self._field(record, name)
            if value is None:
                return None
            used[name] = _Joined(value) if isinstance(value, list) else value
        try:
            return text.format(**used)
        except (ValueError, TypeError, AttributeError, LookupError) as error:
            raise DataError(f"{record.place}: data.{key} cannot be filled in: {error}") from error

    def _check_choices(self, choices: Any, label: Any, record: Record) -> None:
        if not isinstance(choices, list) or len(choices) < 2:
            raise DataError(f"{record.place}: {self.section.choices!r} must be a list of two choices or more")
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < len(choices):
            raise DataError(
                f"{record.place}: {self.section.label!r} is {label!r}; it must be 0 to {len(choices) - 1}, "
                "the index of the right choice"
            )

    def _prompt_ids(self, prompt: str, record: Record) -> tuple[int, ...]:
        if self.section.template == "chat":
            message = [{"role": "user", "content": prompt}]
            ids = self.tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
            return tuple(ids)
        ids = self._encode(prompt)
        if not ids:
            raise DataError(f"{record.place}: the prompt is empty, so there is nothing to answer")
        return ids

    def _answer_ids(self, prompt: str, prompt_ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
        """Tokens of the answer as they follow the prompt, never changing the prompt's own tokens."""
        if self.section.template == "plain":
            whole = self._encode(prompt + answer)
            if len(whole) > len(prompt_ids) and whole[: len(prompt_ids)] == prompt_ids:
                return whole[len(prompt_ids) :]
        return tuple(self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def _finished(self, prompt: str, prompt_ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
        return (*self._answer_ids(prompt, prompt_ids, answer), self.tokenizer.eos_token_id)

    def _encode(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer(text)["input_ids"])
        if ids and ids[-1] == self.tokenizer.eos_token_id:  # some tokenizers end every text themselves
            ids = ids[:-1]
        return ids


class _Joined(list[Any]):
    """A list of a record: written out with commas, or indexed by the format string."""

    def __str__(self) -> str:
        return ", ".join(map(str, self))

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)


def fields_of(text: str, key: str) -> list[str]:
    """The field names a format string uses.

    Raises: DataError if it is not a format string over named fields.
    """
    try:
        names = [name for _, name, _, _ in Formatter().parse(text) if name is not None]
    except ValueError as error:
        raise DataError(f"data.{key} is not a format string: {error}; write {{{{ for a brace") from error
    fields = [name.split(".")[0].split("[")[0] for name in names]
    if any(not field or field.isdigit() for field in fields):
        raise DataError(f"data.{key} must name its fields, for instance {{question}}: {text!r}")
    return fields
