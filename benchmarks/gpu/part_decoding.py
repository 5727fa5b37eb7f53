"""Decoding with compressed blocks of Llama-3-8B in transformers: bfloat16 against INT4.

The four blocks of `part_compression`, opened as anybody would: dense in bfloat16, and the compressed-tensors
directory with the integer kernel that transformers finds, or with none, which the row then says. Seconds a
token of a prompt of 32, batch 1; a head of 128 k tokens weighs more beside four blocks than beside 32.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from benchmarks.gpu.part_compression import compress, write_blocks
from benchmarks.gpu.part_facts import synchronize
from benchmarks.gpu.rows import Rows
from transformers import AutoModelForCausalLM

__all__ = ["measure"]

PROMPT, NEW = 32, 64
INT4 = {"method": "rtn", "group_size": 128}  # the codes do not matter for time


def measure(rows: Rows) -> None:
    """A row for each form of the model."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        rows.measure("blocks", partial(prepare, directory, rows))
        for form, place in (("bfloat16", "dense"), ("int4", "rtn-int4")):
            rows.measure(form, partial(decode, directory / place, rows))


def prepare(directory: Path, rows: Rows) -> dict[str, Any]:
    """Write the dense and the INT4 model."""
    written = write_blocks(directory / "dense", rows)
    compress(directory, "rtn", INT4, rows, sparsify={"method": "magnitude"})
    return written


def decode(directory: Path, rows: Rows) -> dict[str, Any]:
    """Tokens a second after a first round, and memory."""
    new = 4 if rows.dry else NEW
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(rows.device).eval()
    prompt = torch.arange(5, 5 + PROMPT, device=rows.device)[None]
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}
    seconds = []
    for _ in range(3):
        synchronize(rows.device)
        start = time.perf_counter()
        model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        synchronize(rows.device)
        seconds.append((time.perf_counter() - start) / new)
    linear = model.model.layers[0].self_attn.q_proj
    return {
        "token_seconds": seconds[1:],
        "tokens_per_second": 1 / min(seconds[1:]),
        "layer": f"{type(linear).__name__}, {', '.join(sorted(dict(linear.named_parameters())))}",
        "peak_bytes": torch.cuda.max_memory_allocated() if rows.device == "cuda" else 0,
    }
