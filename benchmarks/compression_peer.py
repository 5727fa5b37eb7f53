"""llm-compressor's side of `benchmarks.compression_speed`, run by its own interpreter; sqft is not imported.

    PEER_PYTHON benchmarks/compression_peer.py JOB MODEL TOKENS OUT THREADS GROUP_SIZE

JOB is wanda or gptq; TOKENS a safetensors file of token ids (n, length). The model is written to OUT; the
last line printed is a JSON object of what it took.
"""

import json
import resource
import sys
import time

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.pruning import WandaPruningModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def recipe(job: str, group_size: int) -> object:
    """The modifier of a job, with its own defaults where both sides need not agree."""
    if job == "wanda":
        return WandaPruningModifier(sparsity=0.5, mask_structure="0:0", ignore=["re:.*lm_head"])
    weights = QuantizationArgs(
        num_bits=4, type="int", symmetric=True, strategy="group", group_size=group_size
    )
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    return GPTQModifier(config_groups={"group_0": scheme}, ignore=["lm_head"], actorder=None)


def peak_bytes() -> int:
    """The most memory that this process has had resident so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Load, compress, save; print how long each took, and the peak of memory up to the end of compression."""
    job, directory, tokens, out, threads, group_size = sys.argv[1:]
    torch.set_num_threads(int(threads))
    ids = load_file(tokens)["tokens"]
    dataset = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    loaded = time.perf_counter()
    oneshot(
        model=model,
        dataset=dataset,
        recipe=recipe(job, int(group_size)),
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
    )
    compressed, peak = time.perf_counter(), peak_bytes()
    model.save_pretrained(out, save_compressed=True)
    saved = time.perf_counter()
    facts = {"load": loaded - started, "compress": compressed - loaded, "save": saved - compressed}
    print(json.dumps({"seconds": facts, "peak_bytes": peak, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
