"""Elastic adapters in TRL's trainers, and their merge to a certified model: sqft as a PEFT method.

    pip install 'sqft[trl]'
    python examples/with_trl.py int4-model tuned-model

`int4-model` is a directory that `sqft compress MODEL sparsify.sparsity=0.5 quantize.bits=4` wrote. SFTTrainer
trains quantization-aware adapters of several ranks (NLS) on it, DPOTrainer goes on with preferences, and
`sqft merge` makes one sparse INT4 model of the result, with a certificate.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from sqft.adapters import SqftConfig
from sqft.cli import run_command_line
from sqft.models import load_tokenizer, load_trainable
from sqft.training import RankSampler

SUMS = [(f"what is {a} plus {b}? ", str(a + b), str(a + b + 1)) for a in range(6) for b in range(6)]
SHARED: dict[str, Any] = {
    "max_length": 64,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": not torch.cuda.is_available(),
}


def main(base_dir: str, merged_dir: str, steps: int = 4) -> tuple[list[float], list[float]]:
    """Return the losses of both trainings."""
    tokenizer = load_tokenizer(Path(base_dir))
    model = get_peft_model(
        load_trainable(Path(base_dir)),
        SqftConfig(method="qa_sparse_peft", ranks=[8, 4], alpha=16, dropout=0.05, task_type="CAUSAL_LM"),
    )
    with tempfile.TemporaryDirectory() as folder:
        taught = SFTTrainer(
            model=model,
            args=SFTConfig(f"{folder}/sft", max_steps=steps, learning_rate=2e-2, **SHARED),
            train_dataset=Dataset.from_list([{"prompt": q, "completion": a} for q, a, _ in SUMS]),
            processing_class=tokenizer,
            callbacks=[RankSampler(seed=0)],  # another sub-adapter each step; column dropout follows it
        )
        taught.train()
        preferred = DPOTrainer(
            model=model,
            args=DPOConfig(f"{folder}/dpo", max_steps=steps, learning_rate=5e-3, **SHARED),
            train_dataset=Dataset.from_list([{"prompt": q, "chosen": a, "rejected": w} for q, a, w in SUMS]),
            processing_class=tokenizer,
            callbacks=[RankSampler(seed=0)],
        )
        preferred.train()
        model.save_pretrained(f"{folder}/adapter")
        code = run_command_line(
            ["merge", "--base", base_dir, "--adapter", f"{folder}/adapter", "--output", merged_dir]
        )
    if code:
        sys.exit(code)
    return losses(taught), losses(preferred)


def losses(trainer: SFTTrainer | DPOTrainer) -> list[float]:
    """The loss of every step."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    print(main(sys.argv[1], sys.argv[2]))
