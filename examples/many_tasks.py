"""One sparse INT4 base, many tasks: each is a small adapter of trained scales and norms.

    python examples/many_tasks.py my-sparse-int4-model adapters merged-model

The base is a quantized model directory, as `sqft compress my-model sparsify.sparsity=0.5 quantize.bits=4`
writes it. Its codes are in memory once, half a byte a weight; an adapter changes none of them.
"""

import sys
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model

from sqft.adapters import SqftConfig
from sqft.models import load_tokenizer, load_trainable
from sqft.pipeline.merging import merge_trained

TASKS = {
    "sums": ["question: what is 3 plus 4? answer: 7", "question: what is 2 plus 2? answer: 4"],
    "animals": ["the quick brown fox jumps over the lazy dog", "the lazy dog runs home"],
}


def main(base_dir: str, adapters_dir: str, merged_dir: str, steps: int = 20) -> dict[str, dict[str, float]]:
    """Return the loss of every task under every adapter, and under none."""
    tokenizer = load_tokenizer(Path(base_dir))
    batches = {task: tokenizer(texts, return_tensors="pt", padding=True) for task, texts in TASKS.items()}
    for task, batch in batches.items():
        train(base_dir, batch, steps).save_pretrained(f"{adapters_dir}/{task}")

    base = load_trainable(Path(base_dir), base_precision="packed")
    model = PeftModel.from_pretrained(base, f"{adapters_dir}/sums", adapter_name="sums")
    model.load_adapter(f"{adapters_dir}/animals", adapter_name="animals")
    losses = {}
    for task in TASKS:
        model.set_adapter(task)  # a switch: nothing is copied, nothing is decoded anew
        losses[task] = measure(model, batches)
    with model.disable_adapter():
        losses["none"] = measure(model, batches)

    # One of them as a model of its own, for a runtime that knows no adapters; the command line does the same:
    # sqft merge --base BASE --adapter adapters/sums --output MERGED
    checks = merge_trained(Path(base_dir), Path(adapters_dir) / "sums", Path(merged_dir))
    print(f"{merged_dir}: {len(checks)} checks of the certificate passed")
    return losses


def train(base_dir: str, batch: dict[str, torch.Tensor], steps: int) -> PeftModel:
    """Train the scales and norms of the base on a batch."""
    base = load_trainable(Path(base_dir), base_precision="packed")
    model = get_peft_model(base, SqftConfig(method="scales", task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=6e-3)
    for _ in range(steps):
        model(**batch, labels=batch["input_ids"]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def measure(model: PeftModel, batches: dict[str, dict[str, torch.Tensor]]) -> dict[str, float]:
    """The loss of each task."""
    found = {task: model(**batch, labels=batch["input_ids"]).loss.item() for task, batch in batches.items()}
    print("  ".join(f"{task} {loss:.3f}" for task, loss in found.items()))
    return found


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3])
