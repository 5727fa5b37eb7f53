"""Running GGUF files in llama.cpp, through the prebuilt wheels of xllamacpp."""

import json
import math
import os
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sqft.errors import ExportError, require
from sqft.models.gguf_header import open_gguf

__all__ = ["LlamaCpp", "check_tokenizer"]

EVERY_TOKEN = 1_000_000  # more than any vocabulary has


class LlamaCpp:
    """A model in llama.cpp's server, inside this process.

    lora_path: an adapter in GGUF that is applied at run time, unmerged.
    """

    def __init__(
        self, path: Path, *, context: int = 512, threads: int | None = None, lora_path: Path | None = None
    ) -> None:
        xllamacpp = require("xllamacpp", "gguf")
        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx = context
        parameters.n_parallel = 1
        parameters.warmup = False
        parameters.verbosity = -1
        count = threads or torch.get_num_threads()
        parameters.cpuparams.n_threads = count
        parameters.cpuparams_batch.n_threads = count
        if lora_path is not None:
            adapter = xllamacpp.CommonAdapterLoraInfo(str(lora_path), 1.0)
            parameters.lora_adapters = [adapter]
        try:
            with silent_output():
                self._server = xllamacpp.Server(parameters)
        except RuntimeError as error:
            raise ExportError(f"llama.cpp cannot open {path}: {error}") from error
        self.path, self.max_length = path, context
        self._letter = self.tokenize("a")[0]

    def tokenize(self, text: str) -> list[int]:
        """The ids of a text, special tokens parsed, none added."""
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize",
            data=json.dumps({"content": text, "add_special": False, "parse_special": True}).encode(),
            headers={"Content-Type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # the server is in this process
        with direct.open(request, timeout=60) as response:
            return [int(token) for token in json.loads(response.read())["tokens"]]

    def next_log_probabilities(
        self, token_ids: Sequence[int], vocabulary: int
    ) -> Float[Tensor, "vocabulary"]:
        """log softmax of the logits after the last token.

        The token that is then sampled is forced to be a letter, since the server keeps back the
        probabilities of an end token or half a character; the bias does not enter the probabilities.
        """
        answer = self._complete(
            {
                "prompt": list(token_ids),
                "n_predict": 1,
                "n_probs": vocabulary,
                "temperature": 0.0,
                "logit_bias": [[self._letter, 1000.0]],
            }
        )
        content = answer["choices"][0]["logprobs"]["content"]
        values = torch.full((vocabulary,), -torch.inf)
        for entry in content[0]["top_logprobs"]:
            values[entry["id"]] = entry["logprob"]
        return values

    def score(self, ids: Sequence[int], wanted: Sequence[tuple[int, int]]) -> list[float]:
        """log P(t | ids[0 .. p]) of every (p, t): t is forced, which does not enter its probability."""
        order = sorted(range(len(wanted)), key=lambda index: wanted[index])  # long prompts reuse short ones
        values = [0.0] * len(wanted)
        for index in order:
            position, token = wanted[index]
            values[index] = self._score(list(ids[: position + 1]), token)
        return values

    def _score(self, prompt: list[int], token: int) -> float:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": 1, "temperature": 0.0}
        answer = self._complete(request | {"logit_bias": [[token, 1000.0]]})
        told = answer["choices"][0]["logprobs"]
        if told is not None and told["content"] and told["content"][0]["id"] == token:
            return float(told["content"][0]["logprob"])
        # The server gives no probability of a lone first byte of a character, unless it lists many tokens.
        answer = self._complete(request | {"n_probs": EVERY_TOKEN, "logit_bias": [[self._letter, 1000.0]]})
        entries = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return next((float(entry["logprob"]) for entry in entries if entry["id"] == token), -math.inf)

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """The most likely next token, again and again, the end token included."""
        context = list(ids)
        while len(context) < self.max_length:
            answer = self._complete(
                {
                    "prompt": context,
                    "n_predict": 1,
                    "temperature": 0.0,
                    "return_tokens": True,
                    "verbose": True,
                }
            )
            (token,) = answer["__verbose"]["tokens"]
            yield int(token)
            context.append(int(token))

    @property
    def has_chat_template(self) -> bool:
        """Whether the file has a chat template; without one llama.cpp would use a form of its own."""
        return "tokenizer.chat_template" in open_gguf(self.path).fields

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        told: Callable[[str], None],
        max_new_tokens: int,
        temperature: float,
        *,
        raw: bool = False,
    ) -> str:
        """The answer to messages by the model's chat template; `told` is called with each piece of it.

        raw: the last message is continued as it stands instead.

        Raises: ExportError if llama.cpp refuses, as it does where the context is full.
        """
        request = {"temperature": temperature, "max_tokens": max_new_tokens, "stream": True}
        pieces: list[str] = []
        refusals: list[str] = []

        def take(part: dict[str, Any]) -> bool:
            if "choices" not in part:
                refusals.append(json.dumps(part)[:200])
                return True
            choice = part["choices"][0]
            piece = choice.get("text") if raw else choice["delta"].get("content")
            if piece:
                pieces.append(piece)
                told(piece)
            return False

        if raw:
            self._server.handle_completions(request | {"prompt": messages[-1]["content"]}, take)
        else:
            self._server.handle_chat_completions(request | {"messages": list(messages)}, take)
        if refusals:
            raise ExportError(f"llama.cpp refused a request: {refusals[0]}")
        return "".join(pieces)

    def generate(self, token_ids: Sequence[int], num_tokens: int) -> dict[str, float]:
        """Generate greedily, whatever the end token, and return llama.cpp's timings."""
        answer = self._complete(
            {
                "prompt": list(token_ids),
                "n_predict": num_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        return {key: float(value) for key, value in answer["timings"].items() if not isinstance(value, str)}

    def _complete(self, request: dict[str, Any]) -> dict[str, Any]:
        answer = self._server.handle_completions(request)
        values: dict[str, Any] = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        if "choices" not in values:
            raise ExportError(f"llama.cpp refused a request: {json.dumps(values)[:200]}")
        return values


def check_tokenizer(tokenizer: Any, runtime: LlamaCpp) -> None:
    """Compare llama.cpp's token ids with the tokenizer's on probe texts.

    Raises: ExportError if they differ.
    """
    probes = [
        "Hello, world! It's 3.14 + 12345 = 7?",
        "def f(x):\n\treturn  x**2  # naïve",
        "Ünïcödé 日本語 🙂",
    ]
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "What is 3 plus 4?"}]
        probes.append(tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))
    for text in probes:
        expected = tokenizer(text, add_special_tokens=False).input_ids
        if runtime.tokenize(text) != expected:
            raise ExportError(f"llama.cpp splits {text[:40]!r} into other tokens than the model's tokenizer")


@contextmanager
def silent_output() -> Iterator[None]:
    """Discard what native code prints."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(descriptor) for descriptor in (1, 2)]
    sink = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in (1, 2):
            os.dup2(sink, descriptor)
        yield
    finally:
        for descriptor, original in zip((1, 2), kept, strict=True):
            os.dup2(original, descriptor)
            os.close(original)
        os.close(sink)
