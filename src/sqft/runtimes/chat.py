"""A conversation with a finished model, in whichever runtime opens it, answers told piece by piece."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from sqft.errors import ExportError
from sqft.models import load_tokenizer
from sqft.runtimes.hf import open_in_transformers
from sqft.runtimes.llama_cpp import LlamaCpp
from sqft.runtimes.llama_plugin import use_packed_products
from sqft.runtimes.speed import Artefact

__all__ = ["Answer", "Messages", "open_chat"]

CONTEXT = 4096  # tokens of a conversation in llama.cpp
Messages = list[dict[str, str]]
Told = Callable[[str], None]
# The answer to messages; `told` is called with each piece of it.
Answer = Callable[[Messages, Told], str]


def open_chat(
    artefact: Artefact, *, max_new_tokens: int, temperature: float, raw: bool, threads: int
) -> Answer:
    """Open a model for a conversation. temperature: 0 takes the most likely token always.

    raw: the last message is continued as it stands; else all go through the model's chat template.

    Raises: ExportError if its runtime cannot chat, or the model has no chat template and raw is not set.
    """
    if artefact.runtime.startswith("llama.cpp"):
        if artefact.runtime == "llama.cpp + sqft":
            use_packed_products()
        runtime = LlamaCpp(artefact.path, context=CONTEXT, threads=threads, lora_path=artefact.adapter)
        if not raw and not runtime.has_chat_template:
            raise _no_template(artefact.path)
        return lambda messages, told: runtime.chat(messages, told, max_new_tokens, temperature, raw=raw)
    if not artefact.runtime.startswith("transformers"):
        raise ExportError(f"sqft chat opens model directories and GGUF files, not {artefact.runtime} models")
    tokenizer = load_tokenizer(artefact.path)
    if not raw and not tokenizer.chat_template:
        raise _no_template(artefact.path)
    torch.set_num_threads(threads)
    packed = artefact.runtime == "transformers + sqft"
    model = open_in_transformers(artefact.path, artefact.adapter, packed=packed)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    return lambda messages, told: _answer(model, tokenizer, _prompt(tokenizer, messages, raw), told, options)


def _no_template(path: Path) -> ExportError:
    return ExportError(
        f"{path} has no chat template; with --raw each line is continued as it stands: write it in the form "
        "of the prompts that the model was trained on"
    )


def _prompt(tokenizer: PreTrainedTokenizerBase, messages: Messages, raw: bool) -> list[int]:
    if raw:
        return list(tokenizer(messages[-1]["content"]).input_ids)
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def _answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: list[int],
    told: Told,
    options: dict[str, Any],
) -> str:
    limit = int(getattr(model.config, "max_position_embeddings", 0) or 0)
    if limit and len(prompt) + options["max_new_tokens"] > limit:
        raise ExportError(
            f"the conversation has {len(prompt)} tokens, the model's context {limit}; start anew with /new"
        )
    ids = torch.tensor([prompt], device=model.device)
    streamer = _Streamer(tokenizer, told)
    mask = torch.ones_like(ids)
    model.generate(
        ids, attention_mask=mask, streamer=streamer, pad_token_id=tokenizer.pad_token_id, **options
    )
    return "".join(streamer.pieces)


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Hands on text as soon as it is whole words."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, told: Told) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.told = told
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by transformers with each piece."""
        self.pieces.append(text)
        self.told(text)
