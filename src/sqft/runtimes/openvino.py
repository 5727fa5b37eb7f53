"""Running OpenVINO IR on a CPU."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sqft.errors import require

__all__ = ["OpenVinoModel"]


class OpenVinoModel:
    """An IR file on this CPU. exact: float32 arithmetic throughout; else the runtime's own choice."""

    def __init__(
        self, path: Path, *, exact: bool = True, threads: int | None = None, max_length: int = 2048
    ) -> None:
        ov = require("openvino", "openvino")
        options: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads or torch.get_num_threads()}
        if exact:
            options |= {
                "INFERENCE_PRECISION_HINT": "f32",
                "KV_CACHE_PRECISION": "f32",
                "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
            }
        self._request = ov.Core().compile_model(path, "CPU", options).create_infer_request()
        self._length = 0
        self.max_length = max_length

    def reset(self) -> None:
        """Clear the key-value cache."""
        self._request.reset_state()
        self._length = 0

    def score(self, ids: Sequence[int], wanted: Sequence[tuple[int, int]]) -> list[float]:
        """log P(t | ids[0 .. p]) of every (p, t)."""
        self.reset()
        logs = self.logits(list(ids)).log_softmax(dim=-1)
        return [float(logs[position, token]) for position, token in wanted]

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """The most likely next token, again and again, the end token included."""
        self.reset()
        new = list(ids)
        while self._length + len(new) <= self.max_length:
            new = [int(self.logits(new)[-1].argmax())]
            yield new[0]

    def logits(self, token_ids: list[int]) -> Tensor:
        """(tokens, vocabulary) float32 logits of tokens that continue the context."""
        end = self._length + len(token_ids)
        result = self._request.infer(
            {
                "input_ids": np.array([token_ids], np.int64),
                "attention_mask": np.ones((1, end), np.int64),
                "position_ids": np.arange(self._length, end, dtype=np.int64)[None],
                "beam_idx": np.zeros(1, np.int32),
            }
        )
        self._length = end
        return torch.from_numpy(result["logits"][0].copy())
