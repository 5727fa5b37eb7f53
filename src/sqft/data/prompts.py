"""Records to items: the text of prompt and answer, and their token ids."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from sqft.data.conversations import render_conversation
from sqft.data.forms import Answer, Choices, Conversation, Shape, Text, recognise_form, shape_record
from sqft.data.items import Example, shared_ids
from sqft.data.records import Record
from sqft.data.templates import field_names
from sqft.errors import DataError
from sqft.sections import DataSection

__all__ = ["PromptFormat"]

Ids = TypeVar("Ids", list[int], tuple[int, ...])
CHUNK = 512  # records that are tokenized together
EMPTY = "the prompt is empty, so there is nothing to answer"


@dataclass(frozen=True)
class PromptFormat:
    """How records of one form become items, for one tokenizer.

    With `choices` in the section, the answer's format string is applied once for each choice, which stands in
    for the field `answer`.
    """

    section: DataSection
    tokenizer: PreTrainedTokenizerBase
    form: str
    share: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, first: Record, section: DataSection, tokenizer: PreTrainedTokenizerBase) -> "PromptFormat":
        """The format of a source, by its first record.

        Raises: DataError if their form is not known, or the tokenizer lacks what it needs.
        """
        return cls(section, tokenizer, recognise_form(first, section))

    def __post_init__(self) -> None:
        for key in ("prompt", "answer"):
            field_names(getattr(self.section, key) or "", key)
        if self.tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-text token, so a model cannot learn where to stop")
        if self.section.template == "chat" and not self.tokenizer.chat_template:
            raise DataError("the tokenizer has no chat template; write data.template: plain")

    @property
    def chat(self) -> bool:
        """Whether prompts and answers are written by the chat template."""
        if self.section.template is not None:
            return self.section.template == "chat"
        return self.form == "alpaca" and bool(self.tokenizer.chat_template)

    def examples(self, records: Iterable[Record]) -> Iterator[tuple[str, Example | None]]:
        """The place and item of each record, None where a field is null; of texts, windows of their tokens.

        Raises: DataError, with the place, for a record that is not what it should be.
        """
        if self.form == "text":
            for example in self._windows(records):
                yield "", example
            return
        records = iter(records)
        while chunk := list(islice(records, CHUNK)):
            shapes = [shape_record(record, self.form, self.section) for record in chunk]
            made: Iterator[Example | None]
            if self.chat or not all(isinstance(shape, Answer | None) for shape in shapes):
                made = map(self._shaped, shapes, chunk)
            else:
                made = self._answers(shapes, chunk)
            yield from zip([record.place for record in chunk], made, strict=True)

    def example(self, record: Record) -> Example | None:
        """The record as an item, or None where a field it needs is null, or the answer is empty.

        Raises: DataError, with the place, for a record that is not what it should be.
        """
        return self._shaped(shape_record(record, self.form, self.section), record)

    def _shaped(self, shape: Shape | None, record: Record) -> Example | None:
        if shape is None:
            return None
        if isinstance(shape, Conversation):
            return self._conversation(shape, record)
        if isinstance(shape, Text):
            raise DataError(f"{record.place}: a text has no answer; texts are cut into windows together")
        if isinstance(shape, Choices):
            return self._choices(shape, record)
        if self.chat:
            return self._conversation(_asked(shape.prompt, shape.answer), record)
        return next(self._answers([shape], [record]))

    def _answers(self, shapes: Iterable[Shape | None], records: Iterable[Record]) -> Iterator[Example | None]:
        """Prompts with their answers, all tokenized in one call: of many short texts that takes half."""
        asked = [shape if isinstance(shape, Answer) else None for shape in shapes]
        there = [shape for shape in asked if shape is not None]
        prompts = self._encode_all([shape.prompt for shape in there])
        wholes = self._encode_all([shape.prompt + shape.answer for shape in there])
        found = [_following(ids, whole) for ids, whole in zip(prompts, wholes, strict=True)]
        alone = [shape.answer for shape, ids in zip(there, found, strict=True) if ids is None]
        rest = iter(self._encode_all(alone, add_special_tokens=False))
        items = zip(prompts, [next(rest) if ids is None else ids for ids in found], strict=True)
        for shape, record in zip(asked, records, strict=True):
            if shape is None:
                yield None
                continue
            prompt_ids, answer_ids = next(items)
            if not prompt_ids:
                raise DataError(f"{record.place}: {EMPTY}")
            yield Example(
                shape.prompt,
                shape.answer,
                shared_ids(prompt_ids, self.share),
                shared_ids([*answer_ids, self.tokenizer.eos_token_id], self.share),
            )

    def _choices(self, shape: Choices, record: Record) -> Example:
        right = shape.choices[shape.label]
        if self.chat:
            asked = [self._conversation(_asked(shape.prompt, choice), record) for choice in shape.choices]
            first = asked[shape.label]
            ends = self.tokenizer.eos_token_id
            ids = tuple(
                item.answer_ids[:-1] if item.answer_ids[-1] == ends else item.answer_ids for item in asked
            )
            return Example(first.prompt, right, first.prompt_ids, first.answer_ids, ids, shape.label)
        prompt_ids = self._prompt_ids(shape.prompt, record)
        return Example(
            shape.prompt,
            right,
            prompt_ids,
            self._finished(shape.prompt, prompt_ids, right),
            tuple(self._answer_ids(shape.prompt, prompt_ids, text) for text in shape.choices),
            shape.label,
        )

    def _conversation(self, conversation: Conversation, record: Record) -> Example:
        if not self.tokenizer.chat_template:
            raise DataError(
                f"{record.place}: messages need a chat template, and the model's tokenizer has none; take a "
                "model that was tuned to chat, or write data.prompt and data.answer, for instance "
                "'{messages[0][content]}'"
            )
        rendered = render_conversation(conversation, self.tokenizer, record.place)
        encoded = self.tokenizer(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
        prompt_ids = tuple(encoded["input_ids"])
        counted = tuple(_token_span(encoded["offset_mapping"], span) for span in rendered.earlier)
        answer_ids = self._end_turn(self._following_ids(rendered.text, prompt_ids, rendered.answer))
        last = conversation.messages[-1].get("content") or rendered.answer
        return Example(
            rendered.text,
            str(last),
            prompt_ids,
            answer_ids,
            earlier_answers=tuple(span for span in counted if span[0] < span[1]),
            uncounted_turns=rendered.uncounted,
        )

    def _windows(self, records: Iterable[Record]) -> Iterator[Example | None]:
        """All texts one after the other, each with the end-of-text token, cut to `sequence_length`."""
        length, rest = self.section.sequence_length, list[int]()
        for record in records:
            shape = shape_record(record, "text", self.section)
            if shape is None:
                yield None
                continue
            assert isinstance(shape, Text)
            rest += (*self._encode(shape.text), self.tokenizer.eos_token_id)
            while len(rest) >= length:
                yield self._window(rest[:length])
                rest = rest[length:]
        if len(rest) > 1:
            yield self._window(rest)

    def _window(self, ids: Sequence[int]) -> Example:
        first, others = ids[:1], ids[1:]
        text = [str(self.tokenizer.decode(part)) for part in (first, others)]
        return Example(text[0], text[1], tuple(first), tuple(others), is_text=True)

    def _prompt_ids(self, prompt: str, record: Record) -> tuple[int, ...]:
        ids = self._encode(prompt)
        if not ids:
            raise DataError(f"{record.place}: {EMPTY}")
        return ids

    def _answer_ids(self, prompt: str, prompt_ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
        """Tokens of the answer as they follow the prompt, never changing the prompt's own tokens."""
        following = _following(prompt_ids, self._encode(prompt + answer))
        return self._encode(answer, add_special_tokens=False) if following is None else following

    def _following_ids(self, text: str, ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
        """As `_answer_ids`, where the text holds its special tokens already."""
        whole = tuple(self.tokenizer(text + answer, add_special_tokens=False)["input_ids"])
        following = _following(ids, whole)
        if following is None:
            return tuple(self.tokenizer(answer, add_special_tokens=False)["input_ids"])
        return following

    def _end_turn(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """An answer that ends with a token at which generation stops: the template's own, or end of text.

        What the template writes after its own is the beginning of the next turn.
        """
        special = set(self.tokenizer.all_special_ids) | {
            index for index, token in self.tokenizer.added_tokens_decoder.items() if token.special
        }
        last = max((place for place, token in enumerate(ids) if token in special), default=-1)
        if last >= 0 and not str(self.tokenizer.decode(ids[last + 1 :])).strip():
            return ids[: last + 1]
        return (*ids, self.tokenizer.eos_token_id)

    def _finished(self, prompt: str, prompt_ids: tuple[int, ...], answer: str) -> tuple[int, ...]:
        return (*self._answer_ids(prompt, prompt_ids, answer), self.tokenizer.eos_token_id)

    def _encode(self, text: str, **options: bool) -> tuple[int, ...]:
        return tuple(self._encode_all([text], **options)[0])

    def _encode_all(self, texts: list[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        if not texts:
            return []
        found = self.tokenizer(texts, verbose=False, add_special_tokens=add_special_tokens)["input_ids"]
        end = self.tokenizer.eos_token_id if add_special_tokens else None
        # Some tokenizers end every text themselves.
        return [ids[:-1] if ids and ids[-1] == end else ids for ids in found]


def _following(ids: Ids, whole: Ids) -> Ids | None:
    """What follows the ids in the tokens of a whole text; None where these begin differently."""
    continues = len(whole) > len(ids) and whole[: len(ids)] == ids
    return whole[len(ids) :] if continues else None


def _asked(prompt: str, answer: str) -> Conversation:
    """A question and its answer as a conversation, without the space that sets them apart in plain text."""
    return Conversation(
        ({"role": "user", "content": prompt.strip()}, {"role": "assistant", "content": answer.strip()})
    )


def _token_span(offsets: Sequence[tuple[int, int]], span: tuple[int, int]) -> tuple[int, int]:
    """The tokens that begin inside a span of characters."""
    inside = [
        place for place, (start, end) in enumerate(offsets) if span[0] <= start < span[1] and end > start
    ]
    return (inside[0], inside[-1] + 1) if inside else (0, 0)
