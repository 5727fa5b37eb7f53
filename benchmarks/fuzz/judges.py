"""What is wrong with a result that was accepted: told by readers that share no code with what made it.

Every judge returns None, or what is wrong in a few words.
"""

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, CompressedTensorsConfig

from sqft.artifacts import digest_files

__all__ = [
    "judge_items",
    "judge_lora",
    "judge_model",
    "judge_same",
    "judge_source",
    "judge_weights_of_gguf",
]

SIZES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
PERMUTED = ("attn_q", "attn_k")  # rows in another order
TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def judge_same(directory: Path, digests: dict[str, str]) -> str | None:
    """A directory has just these files."""
    found = digest_files(directory)
    wrong = sorted(name for name in found.keys() | digests.keys() if found.get(name) != digests.get(name))
    return f"other files: {', '.join(wrong[:4])}" if wrong else None


def judge_model(directory: Path) -> str | None:
    """Stock transformers opens a model and its tokenizer, and its logits are numbers."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        grid = "quantization_config" in config
        options = {"quantization_config": CompressedTensorsConfig(dequantize=True)} if grid else {}
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
        with torch.no_grad():
            logits = model(torch.tensor([[2, 5, 9, 30]])).logits
        ids = AutoTokenizer.from_pretrained(directory)("question: what is 3 plus 4?")["input_ids"]
    except Exception as error:
        return f"transformers does not open it: {type(error).__name__}: {error}"
    if not bool(logits.isfinite().all()):
        return "its logits are not numbers"
    size = logits.shape[-1]
    return None if all(0 <= i < size for i in ids) else f"its tokenizer goes beyond {size} tokens"


def judge_source(path: Path, shapes: dict[str, tuple[int, ...]], *, finite: bool = True) -> str | None:
    """A safetensors file is as the format says, and holds tensors of these shapes, of finite numbers."""
    content = path.read_bytes()
    try:
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length].decode("utf-8"))
        header.pop("__metadata__", None)
        data = content[8 + length :]
        if 8 + length > len(content):
            return "its header is cut off"
        places = sorted((*entry["data_offsets"], name) for name, entry in header.items())
        place = 0
        for start, end, name in places:
            entry = header[name]
            if start != place or end - start != math.prod(entry["shape"]) * SIZES[entry["dtype"]]:
                return f"{name} has a gap or another size"
            place = end
        if place != len(data):
            return "bytes are missing or left over"
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        return f"it is not a safetensors file: {error}"
    stored = load_file(path)
    for name, shape in shapes.items():
        if name not in stored or tuple(stored[name].shape) != shape:
            return f"{name} is missing or of another shape"
        if finite and stored[name].is_floating_point() and not bool(stored[name].float().isfinite().all()):
            return f"{name} is not finite"
    return None


def judge_items(path: Path, stage: Path) -> str | None:
    """The items of a JSON-lines file of questions and answers all arrived, as texts that UTF-8 can hold."""
    wanted: Counter[tuple[str, str]] = Counter()
    number = 0
    for row in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not row.strip():
            continue
        try:
            record = json.loads(row.decode("utf-8"), parse_constant=_constant)
            json.dumps(record, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as error:
            return f"a line is no JSON of texts: {error}"
        if not isinstance(record, dict) or not {"question", "answer"} <= record.keys():
            return "a record lacks a field"
        number += 1
        if isinstance(record["question"], str) and isinstance(record["answer"], str):
            wanted[record["question"], record["answer"]] += 1
    found: Counter[tuple[str, str]] = Counter()
    items = 0
    for split in ("train", "search", "test"):
        for line in (stage / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            item = json.loads(line)
            items += 1
            question = item["prompt"].removeprefix("question: ").removesuffix(" answer: ")
            found[question, item["answer"]] += 1
    report = json.loads((stage / "manifest.json").read_text(encoding="utf-8"))["metrics"]["data"]["dropped"]
    dropped = sum(sum(counts.values()) for counts in report.values())
    if items + dropped != number:
        return f"{number} records, but {items} items and {dropped} dropped"
    strange = [pair for pair in found - wanted if all(isinstance(part, str) for part in pair)]
    made_of_texts = sum(wanted.values()) == number
    return f"items that no record is: {strange[:1]}" if made_of_texts and strange else None


def judge_lora(merged: Path, base: Path, adapter: Path) -> str | None:
    """merged = base + B A alpha / rank, to the rounding of storage."""
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        factors = load_file(adapter / "adapter_model.safetensors")
        weights, tuned = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    except Exception as error:
        return f"it cannot be read: {error}"
    if config.get("use_dora") or config.get("use_rslora"):
        return None  # other formulas, which other tests know
    for name, weight in weights.items():
        key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        wanted = weight.double()
        if f"{key}A.weight" in factors:
            scaling = _scaling(config, name.removesuffix(".weight"))
            if scaling is None:
                return "it states no scaling"
            product = factors[f"{key}B.weight"].double() @ factors[f"{key}A.weight"].double()
            wanted = wanted + product * scaling
        off = (tuned[name].double() - wanted).abs()
        if not bool((off <= wanted.abs() * 2**-7 + 1e-6).all()):
            return f"{name} is not base + update: off by {float(off.max()):.3g}"
    return None


def judge_weights_of_gguf(converted: Path, path: Path) -> str | None:
    """A model has the numbers that gguf's own reader finds in the file, where no rows change places."""
    import gguf

    weights = load_file(converted / "model.safetensors")
    for tensor in gguf.GGUFReader(path).tensors:
        parts = tensor.name.removesuffix(".weight").split(".")
        if parts[-1] not in TENSORS:
            continue
        prefix = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        name = f"{prefix}{TENSORS[parts[-1]]}.weight"
        wanted = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        if name not in weights:
            if name == "lm_head.weight":
                continue  # tied
            return f"{name} is missing"
        found = weights[name]
        if not torch.equal(found, wanted.reshape(found.shape).to(found.dtype)):
            return f"{name} has other numbers"
        if not bool(found.isfinite().all()):
            return f"{name} is not finite"
    return None


def _scaling(config: dict[str, Any], name: str) -> float | None:
    import re

    found: dict[str, Any] = {}
    for key, default in (("rank_pattern", config.get("r")), ("alpha_pattern", config.get("lora_alpha"))):
        patterns = config.get(key) or {}
        matches = [value for pattern, value in patterns.items() if re.match(rf"(.*\.)?({pattern})$", name)]
        found[key] = matches[0] if matches else default
    try:
        scaling = float(found["alpha_pattern"]) / float(found["rank_pattern"])
    except (TypeError, ValueError, ArithmeticError):
        return None
    return scaling if math.isfinite(scaling) else None


def _constant(name: str) -> None:
    """NaN is how Python writes a missing number, and counts as null."""
    if name != "NaN":
        raise ValueError(f"{name} is not a number")
