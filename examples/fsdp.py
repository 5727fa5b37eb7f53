"""Masked adapters under FSDP2, in a training loop of your own: each process holds a part of every block.

    torchrun --standalone --nproc-per-node 2 examples/fsdp.py sparse-model adapter

Trains adapters that keep the zeros of a sparse model, each process on texts of its own, and writes the
adapter as one process would: `sqft merge --base sparse-model --adapter adapter --output merged` goes on.
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from torch.distributed.fsdp import fully_shard

from sqft.adapters import SearchSpace, SqftConfig, set_ranks
from sqft.models import load_tokenizer, load_trainable

TEXTS = ["question: what is 3 plus 4? answer: 7", "question: what is 2 plus 2? answer: 4"]


def main(base_dir: str, adapter_dir: str, steps: int = 4) -> None:
    """Train `steps` steps and write the adapter."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    model = build(base_dir, "cuda" if on_gpu else "cpu")
    for block in model.get_base_model().model.layers:
        fully_shard(block)
    fully_shard(model)

    tokenizer = load_tokenizer(Path(base_dir))
    space = SearchSpace.of(model)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    mine = TEXTS[dist.get_rank() % len(TEXTS)]
    batch = tokenizer(mine, return_tensors="pt").to(model.device)
    for step in range(steps):
        set_ranks(model, space.ranks_at(seed=0, step=step))  # the same slice in every process
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()  # gradients are averaged over the processes
        optimizer.step()
        optimizer.zero_grad()

    trained = {name: p.full_tensor().cpu() for name, p in model.named_parameters() if p.requires_grad}
    if dist.get_rank() == 0:
        whole = build(base_dir, "cpu")
        whole.load_state_dict(trained, strict=False)
        whole.save_pretrained(adapter_dir)
        print(f"loss of the last step {loss.item():.3f}; written: {adapter_dir}")
    dist.destroy_process_group()


def build(base_dir: str, device: str) -> PeftModel:
    """The model with its adapters, which start the same in every process."""
    torch.manual_seed(0)
    base = load_trainable(Path(base_dir), device=device)
    return get_peft_model(base, SqftConfig(method="sparse_peft", ranks=[8, 6, 4], task_type="CAUSAL_LM"))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
