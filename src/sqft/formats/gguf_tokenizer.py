"""A Hugging Face tokenizer as GGUF metadata.

llama.cpp splits text with code chosen by a name, so a tokenizer can be carried over only where its splitting
is one that llama.cpp knows; that the ids agree is checked in the runtime afterwards.
"""

import json
import re
from typing import Any

from gguf import GGUFWriter, TokenType

from sqft.errors import ExportError

__all__ = ["check_gguf_tokenizer", "write_tokenizer"]

# What a pre-tokenizer's description must contain → llama.cpp's name of it, first match wins.
SPLITTERS: tuple[tuple[str, str], ...] = (
    (r"\\p{N}{1,3}.*Lu}", "tekken"),
    (r"\\p{N}{1,3}\|", "llama-bpe"),
    (r"\(\?i:'s\|'t.*\\p{N}\|", "qwen2"),
    (r'"Digits".*"individual_digits": true.*"ByteLevel"', "smollm"),
    (r'^\{"type": "ByteLevel".*"use_regex": true', "gpt-2"),
)
BYTE = re.compile(r"^<0x[0-9A-F]{2}>$")


def write_tokenizer(writer: GGUFWriter, tokenizer: Any, vocabulary: int) -> None:
    """Add tokens, merges, special tokens and the chat template.

    Raises: ExportError if llama.cpp has no tokenizer of this kind.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ExportError("gguf needs a tokenizer.json; this model has a slow tokenizer only")
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    if state["model"]["type"] != "BPE":
        raise ExportError(f"gguf cannot hold a {state['model']['type']} tokenizer; only BPE ones")
    by_bytes = bool(state["model"].get("byte_fallback"))
    tokens, kinds = _tokens(state, vocabulary)
    merges = [m if isinstance(m, str) else " ".join(m) for m in state["model"]["merges"]]
    if by_bytes:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_scores(_scores(tokens, merges))
        writer.add_add_space_prefix(_prefixes_space(state))
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitter(state))
        writer.add_token_merges(merges)
        writer.add_add_space_prefix(False)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    _write_special_tokens(writer, tokenizer)
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, str):
        writer.add_chat_template(template)


def check_gguf_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    """Raises: ExportError if llama.cpp has no tokenizer of this kind."""
    write_tokenizer(GGUFWriter(None, "llama"), tokenizer, vocabulary)


def _tokens(state: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{index}]" for index in range(vocabulary)]
    kinds = [int(TokenType.UNUSED)] * vocabulary
    for text, index in state["model"]["vocab"].items():
        tokens[index] = text
        kinds[index] = int(TokenType.BYTE if BYTE.match(text) else TokenType.NORMAL)
    for added in state["added_tokens"]:
        if added["id"] < vocabulary:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    return tokens, kinds


def _scores(tokens: list[str], merges: list[str]) -> list[float]:
    """SentencePiece merges the pair of the highest score first; a merge's rank gives that order."""
    rank = {merge.replace(" ", ""): index for index, merge in reversed(list(enumerate(merges)))}
    return [-float(rank[token]) if token in rank else 0.0 for token in tokens]


def _prefixes_space(state: dict[str, Any]) -> bool:
    return '"Prepend"' in json.dumps(state.get("normalizer")) or '"prepend_scheme": "first"' in json.dumps(
        state.get("pre_tokenizer")
    )


def _splitter(state: dict[str, Any]) -> str:
    described = json.dumps(state.get("pre_tokenizer")).replace("\\\\", "\\")
    for pattern, name in SPLITTERS:
        if re.search(pattern, described):
            return name
    raise ExportError(f"llama.cpp splits text in no way that this tokenizer asks for: {described[:120]}")


def _write_special_tokens(writer: GGUFWriter, tokenizer: Any) -> None:
    for identity, add in (
        (tokenizer.bos_token_id, writer.add_bos_token_id),
        (tokenizer.eos_token_id, writer.add_eos_token_id),
        (tokenizer.unk_token_id, writer.add_unk_token_id),
        (tokenizer.pad_token_id, writer.add_pad_token_id),
    ):
        if identity is not None:
            add(identity)
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id] and tokenizer.bos_token_id is not None
    writer.add_add_bos_token(bool(begins))
