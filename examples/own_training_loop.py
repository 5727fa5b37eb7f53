"""Masked adapters in a training loop of your own: sqft as a PEFT method.

    python examples/own_training_loop.py my-model sparse-model merged-model

Prunes `my-model` by magnitude (no data needed), trains adapters that keep its zeros, merges them, and
checks that no zero was lost.
"""

import sys
from pathlib import Path

import torch
from peft import get_peft_model

from sqft.adapters import SearchSpace, SqftConfig, set_ranks
from sqft.compression import sparsify_model
from sqft.models import CheckpointWriter, load_tokenizer, load_trainable, open_checkpoint
from sqft.sections import SparsifySection

TEXTS = ["question: what is 3 plus 4? answer: 7", "question: what is 2 plus 2? answer: 4"]


def main(model_dir: str, sparse_dir: str, merged_dir: str, steps: int = 4) -> tuple[float, float]:
    """Return the fraction of zeros before and after."""
    source = open_checkpoint(Path(model_dir))
    writer = CheckpointWriter(Path(sparse_dir), source)
    sparsify_model(source, SparsifySection(method="magnitude", sparsity=0.5), None, writer)
    writer.close()

    tokenizer = load_tokenizer(Path(sparse_dir))
    base = load_trainable(Path(sparse_dir))
    model = get_peft_model(base, SqftConfig(method="sparse_peft", ranks=[8, 6, 4], task_type="CAUSAL_LM"))
    space = SearchSpace.of(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    for step in range(steps):
        set_ranks(model, space.ranks_at(seed=0, step=step))  # elastic ranks: another slice each step
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.3f}")

    set_ranks(model, space.median())
    before = sparsity(base)
    merged = model.merge_and_unload()
    merged.save_pretrained(merged_dir)
    tokenizer.save_pretrained(merged_dir)
    after = sparsity(merged)
    print(f"zeros before {before:.4f}, after {after:.4f}")
    return before, after


def sparsity(model: torch.nn.Module) -> float:
    """The fraction of zeros in the linears of the decoder blocks."""
    weights = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n and "sqft_" not in n]
    return sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2], sys.argv[3])
