"""Conversations to token ids: the model's own chat template, and which tokens are the assistant's."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from sqft.data.forms import Conversation
from sqft.errors import DataError
from sqft.untrusted import memory_limit, time_limit

__all__ = ["RenderedConversation", "render_conversation"]

Span = tuple[int, int]
TEMPLATE_SECONDS = 5.0
TEMPLATE_BYTES = 512 * 2**20
MARKERS = ("{% generation", "{%- generation")


@dataclass(frozen=True)
class RenderedConversation:
    """A conversation as its template writes it.

    text: what stands before the last answer, the header of its turn included; answer: what follows, up to
    what ends the turn. earlier: the assistant's earlier turns, as places in the text. uncounted: earlier
    turns that the template writes differently once others follow, so that no loss counts them.
    """

    text: str
    answer: str
    earlier: tuple[Span, ...]
    uncounted: int = 0


def render_conversation(
    conversation: Conversation, tokenizer: PreTrainedTokenizerBase, place: str
) -> RenderedConversation:
    """Write a conversation by the model's chat template, and find the assistant's turns in it.

    A turn lies between the template's `generation` markers, if it has them; else between what the template
    writes before the turn, with the header of an answer, and what it writes with the turn.

    Raises: DataError, with the place, for what the template refuses, or if it has no header for an answer.
    """
    messages = list(conversation.messages)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        with time_limit(TEMPLATE_SECONDS), memory_limit(TEMPLATE_BYTES):
            whole, marked = _render(tokenizer, messages, conversation.tools, mark=True)
            spans = _marked_spans(marked, turns) or _spans(tokenizer, conversation, whole, turns)
    except Exception as error:  # a template is a program, and fails in any way it likes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{place}: the chat template refuses this conversation: {reason}") from error
    start, end = spans.get(turns[-1], (0, 0))
    if not 0 < start < end:
        raise DataError(
            f"{place}: the chat template does not write an answer right behind its header; write "
            "data.prompt and data.answer"
        )
    wanted = [turn for turn in turns[:-1] if turn >= conversation.start]
    found = tuple(spans[turn] for turn in wanted if turn in spans)
    return RenderedConversation(whole[:start], whole[start:end], found, len(wanted) - len(found))


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[dict[str, Any]],
    tools: Sequence[Any] | None,
    *,
    header: bool = False,
    mark: bool = False,
) -> tuple[str, list[Span]]:
    """The text, and the places of `generation` markers where they are asked for and there."""
    template = tokenizer.get_chat_template(tools=list(tools) if tools else None)
    cleaned = [{key: value for key, value in message.items() if value is not None} for message in messages]
    marked = mark and any(marker in template for marker in MARKERS)
    texts, spans = render_jinja_template(
        conversations=[cleaned],
        tools=list(tools) if tools else None,
        chat_template=template,
        return_assistant_tokens_mask=marked,
        add_generation_prompt=header,
        **tokenizer.special_tokens_map,
    )
    return texts[0], [(int(a), int(b)) for a, b in spans[0]] if marked else []


def _marked_spans(marked: list[Span], turns: list[int]) -> dict[int, Span]:
    return dict(zip(turns, marked, strict=True)) if len(marked) == len(turns) else {}


def _spans(
    tokenizer: PreTrainedTokenizerBase, conversation: Conversation, whole: str, turns: list[int]
) -> dict[int, Span]:
    """Where each of the assistant's turns stands in the whole text, of those that can be found."""
    messages, tools = conversation.messages, conversation.tools
    spans: dict[int, Span] = {}
    for turn in turns:
        before, _ = _render(tokenizer, messages[:turn], tools, header=True)
        upto, _ = (whole, []) if turn == turns[-1] else _render(tokenizer, messages[: turn + 1], tools)
        if whole.startswith(upto) and upto.startswith(before):
            spans[turn] = len(before), len(upto)
    return spans
