"""What a record holds: the usual forms, told by their fields, and each brought to one of four shapes.

form                 fields                                                     shape
messages             messages or conversations: a list of role and content      Conversation
                     (or of from and value, as ShareGPT has them)
prompt-completion    prompt and completion, texts or lists of messages          Answer, Conversation
question-answer      question and answer                                        Answer
alpaca               instruction, output and, if there is one, input            Answer
choices              question, choices and label, answer or answerKey           Choices
text                 text                                                       Text
template             what the recipe's format strings name                      Answer, Choices
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from sqft.data.records import Record
from sqft.data.templates import fill_template
from sqft.errors import DataError
from sqft.sections import DataSection

__all__ = ["Answer", "Choices", "Conversation", "Shape", "Text", "recognise_form", "shape_record"]

MESSAGES = ("messages", "conversations", "conversation")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}
KNOWN_ROLES = ("system", "developer", "user", "assistant", "tool")
QUESTIONS = ("question", "question_stem", "query", "ctx")
CHOICE_LISTS = ("choices", "options", "endings")
LABELS = ("label", "answerKey", "answer_index", "answer_idx", "answer", "correct_answer")


@dataclass(frozen=True)
class Answer:
    """A prompt and the text that is to follow it."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Choices:
    """A prompt, the texts that may follow it, and which of them is right."""

    prompt: str
    choices: tuple[str, ...]
    label: int


@dataclass(frozen=True)
class Conversation:
    """Messages with role and content, the last one the assistant's.

    start: the assistant's messages before it belong to the prompt, and the loss does not count them.
    """

    messages: tuple[dict[str, Any], ...]
    start: int = 0
    tools: tuple[Any, ...] | None = None


@dataclass(frozen=True)
class Text:
    """A text without an answer, to be continued."""

    text: str


Shape = Answer | Choices | Conversation | Text


def recognise_form(first: Record, section: DataSection) -> str:
    """The form of a source's records: what the section says, else the one that its first record fits.

    Raises: DataError if none does, naming the fields that are there.
    """
    if section.uses_template:
        return "template"
    if section.form != "auto":
        return section.form
    for form, fits in _FITS.items():
        if fits(first.fields):
            return form
    have = ", ".join(map(repr, first.fields))
    hint = "set data.prompt and data.answer, for instance '{question}' and '{answer}'"
    if {"chosen", "rejected"} <= first.fields.keys():
        hint = "of pairs of preference one answer can be learnt: set data.answer, for instance '{chosen}'"
    raise DataError(f"{first.place}: no form is known that has the fields {have}; {hint}")


def shape_record(record: Record, form: str, section: DataSection) -> Shape | None:
    """A record in its shape, or None where a field that it needs is null, or the answer is empty.

    Raises: DataError, with the place, for what is missing or is not what it should be.
    """
    return _SHAPES[form](record, section)


def _shape_template(record: Record, section: DataSection) -> Shape | None:
    prompt = fill_template("prompt", section.prompt or "{question}", record)
    if section.choices is not None:
        return _template_choices(record, section, prompt)
    answer = fill_template("answer", section.answer or "{answer}", record)
    return Answer(prompt, answer) if prompt is not None and answer else None


def _template_choices(record: Record, section: DataSection, prompt: str | None) -> Choices | None:
    assert section.choices is not None
    choices, names = _choice_texts(record, section.choices)
    label = _choice_index(record, section.label or "label", choices, names)
    if not choices or label is None or prompt is None:
        return None
    form = section.answer or "{answer}"
    texts = [fill_template("answer", form, record, {"answer": choice}) for choice in choices]
    return None if not all(texts) else Choices(prompt, tuple(map(str, texts)), label)


def _shape_choices(record: Record, section: DataSection) -> Choices | None:
    question = _first_field(record, QUESTIONS)
    choices, names = _choice_texts(record, _first_field(record, CHOICE_LISTS))
    label = _choice_index(record, section.label or _first_field(record, LABELS), choices, names)
    text = _text(record, question)
    if text is None or not choices or label is None:
        return None
    return Choices(f"Question: {text}\nAnswer:", tuple(f" {choice}" for choice in choices), label)


def _choice_texts(record: Record, name: str) -> tuple[list[str], list[str] | None]:
    """The choices of a record, and their names if it gives them: a list, or {"text": ..., "label": ...}."""
    value = _field(record, name)
    names = None
    if isinstance(value, Mapping):
        names, value = value.get("label"), value.get("text")
    if value is None:
        return [], None
    texts = isinstance(value, list) and all(isinstance(choice, str | int | float) for choice in value)
    if not texts or len(value) < 2:
        raise DataError(f"{record.place}: {name!r} must be a list of two choices or more, each a text")
    if isinstance(names, list) and len(names) == len(value):
        return [str(choice) for choice in value], [str(n) for n in names]
    return [str(choice) for choice in value], None


def _choice_index(record: Record, name: str, choices: list[str], names: list[str] | None) -> int | None:
    """Which choice a label means: one of their names, an index, a letter, or the text of one."""
    label = _field(record, name)
    if label is None or not choices:
        return None
    text = str(label).strip()
    if not isinstance(label, bool):
        if names is not None and text in names:
            return names.index(text)
        if names is None and text.isdecimal() and int(text) < len(choices):
            return int(text)
        if names is None and len(text) == 1 and text.upper() in ascii_uppercase[: len(choices)]:
            return ascii_uppercase.index(text.upper())
        if isinstance(label, str) and choices.count(label) == 1:
            return choices.index(label)
    wanted = ", ".join(names) if names else f"0 to {len(choices) - 1}, the index of the right choice"
    raise DataError(f"{record.place}: {name!r} is {label!r}; it must be {wanted}")


def _shape_messages(record: Record, section: DataSection) -> Conversation | None:
    name = next((name for name in MESSAGES if name in record.fields), MESSAGES[0])
    value = _field(record, name)
    return None if value is None else _conversation(record, name, value)


def _conversation(record: Record, name: str, value: Any, *, start: int = 0) -> Conversation | None:
    messages = [_message(record, name, message) for message in _message_list(record, name, value)]
    while messages and messages[-1]["role"] != "assistant":
        messages.pop()  # nobody answered these
    if len(messages) <= start:
        return None
    if messages[0]["role"] == "assistant":
        raise DataError(f"{record.place}: {name!r} begins with the assistant; a prompt must come before")
    tools = record.fields.get("tools")
    return Conversation(tuple(messages), start, tuple(tools) if isinstance(tools, list) and tools else None)


def _message_list(record: Record, name: str, value: Any) -> list[Any]:
    if not _is_message_list(value):
        raise DataError(
            f"{record.place}: {name!r} must be a list of messages, each with role and content (or from and "
            "value)"
        )
    return list(value)


def _message(record: Record, name: str, message: dict[str, Any]) -> dict[str, Any]:
    """A message with a role that templates know, and a text."""
    message = dict(message)
    if "from" in message and "role" not in message:
        message |= {"role": message.pop("from"), "content": message.pop("value", None)}
    given = str(message["role"])
    message["role"] = role = ROLES.get(given.lower(), given.lower())
    if role not in KNOWN_ROLES:
        known = ", ".join([*KNOWN_ROLES, *ROLES])
        raise DataError(f"{record.place}: the role {given!r} in {name!r} is unknown; known are {known}")
    content = message.get("content")
    if isinstance(content, list):  # parts, as of models that see images too
        if not all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            raise DataError(f"{record.place}: a message in {name!r} has a part that is not text")
        message["content"] = content = "".join(str(part.get("text", "")) for part in content)
    if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
        raise DataError(
            f"{record.place}: the content of a message in {name!r} is a {type(content).__name__}, no text"
        )
    return message


def _shape_completion(record: Record, section: DataSection) -> Shape | None:
    prompt, completion = _field(record, "prompt"), _field(record, "completion")
    if prompt is None or completion is None:
        return None
    if _is_message_list(prompt) and _is_message_list(completion):
        return _conversation(record, "completion", [*prompt, *completion], start=len(prompt))
    text, answer = _text(record, "prompt"), _text(record, "completion")
    return Answer(text, answer) if text and answer else None


def _shape_question(record: Record, section: DataSection) -> Answer | None:
    question, answer = _text(record, "question"), _text(record, "answer")
    return Answer(f"{question}\n", answer) if question and answer else None


def _shape_alpaca(record: Record, section: DataSection) -> Answer | None:
    instruction, output = _text(record, "instruction"), _text(record, "output")
    if not instruction or not output:
        return None
    given = _text(record, "input") if record.fields.get("input") else ""
    return Answer("\n\n".join(part for part in (instruction, given) if part) + "\n\n", output)


def _shape_text(record: Record, section: DataSection) -> Text | None:
    text = _text(record, "text")
    return Text(text) if text else None


def _field(record: Record, name: str) -> Any:
    if name not in record.fields:
        have = ", ".join(map(repr, record.fields))
        raise DataError(f"{record.place}: no field {name!r}; it has {have}")
    return record.fields[name]


def _first_field(record: Record, names: Sequence[str]) -> str:
    return next((name for name in names if name in record.fields), names[0])


def _text(record: Record, name: str) -> str | None:
    """A field that must hold a text or a number; None if it is null."""
    value = _field(record, name)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return str(value)
    raise DataError(f"{record.place}: the field {name!r} is a {type(value).__name__}, no text")


def _is_message_list(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and ("role" in m or ("from" in m and "value" in m)) for m in value)
    )


def _fits_messages(fields: Mapping[str, Any]) -> bool:
    return any(_is_message_list(fields.get(name)) for name in MESSAGES)


def _fits_choices(fields: Mapping[str, Any]) -> bool:
    lists = [fields[name] for name in CHOICE_LISTS if name in fields]
    return (
        any(isinstance(value, list | Mapping) for value in lists)
        and any(name in fields for name in QUESTIONS)
        and any(name in fields for name in LABELS)
    )


# In the order in which they are tried.
_FITS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "messages": _fits_messages,
    "choices": _fits_choices,
    "prompt-completion": lambda fields: {"prompt", "completion"} <= fields.keys(),
    "alpaca": lambda fields: {"instruction", "output"} <= fields.keys(),
    "question-answer": lambda fields: {"question", "answer"} <= fields.keys(),
    "text": lambda fields: "text" in fields,
}
_SHAPES: dict[str, Callable[[Record, DataSection], Shape | None]] = {
    "alpaca": _shape_alpaca,
    "choices": _shape_choices,
    "messages": _shape_messages,
    "prompt-completion": _shape_completion,
    "question-answer": _shape_question,
    "template": _shape_template,
    "text": _shape_text,
}
