"""A model of two blocks, a task of sums, and recipes for them, that run in a second: for many tries."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

__all__ = ["LEVELS", "write_model", "write_recipe"]

TEXT = ["question: what is 3 plus 4? answer: 7", "the quick brown fox jumps over the lazy dog"]
TEMPLATE = "{% for message in messages %}<|user|>{{ message['content'] }}</s>{% endfor %}"
SECTIONS: dict[str, Any] = {
    "sparsify": {"method": "wanda", "sparsity": 0.5},
    "quantize": {"method": "gptq", "group_size": 32},
    "adapters": {"method": "qa_sparse_peft", "ranks": [8, 4], "alpha": 16},
    "train": {"max_steps": 5, "batch_size": 4, "learning_rate": 2e-2, "checkpoint_steps": 2},
    "search": {"method": "hill_climb", "num_trials": 3},
}
# Each level adds stages to the one before.
LEVELS = {
    "sparsify": ["sparsify"],
    "quantize": ["sparsify", "quantize"],
    "train, search and merge": ["sparsify", "quantize", "adapters", "train", "search"],
}


def write_model(directory: Path, family: str = "llama", **settings: Any) -> Path:
    """A random model of two blocks, 288 tokens and hidden size 64, with a tokenizer.

    family: transformers' model type. settings: of its configuration, beyond or in place of those here.
    """
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=288,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<pad>", "</s>", "<|user|>"],
        show_progress=False,
    )
    core.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    tokenizer.chat_template = TEMPLATE
    values: dict[str, Any] = {
        "vocab_size": 288, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0,
        "eos_token_id": 1, "bos_token_id": None,
    }  # fmt: skip
    config = AutoConfig.for_model(family, **(values | settings))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.12)
    model.bfloat16().save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def write_recipe(
    path: Path, model: Path | dict[str, str], workspace: Path, level: str, **changes: Any
) -> Path:
    """A recipe of a level's stages, and its data beside it. changes: whole sections."""
    items = [
        {"question": f"what is {a} plus {b}?", "answer": str(a + b)} for a in range(10) for b in range(6)
    ]
    data: dict[str, Any] = {"prompt": "question: {question} answer: ", "sequence_length": 64}
    for name, part in (("train", items[:40]), ("search", items[40:48]), ("test", items[48:])):
        data[name] = str(path.with_name(f"{name}.jsonl"))
        Path(data[name]).write_text("".join(json.dumps(item) + "\n" for item in part))
    values = {
        "name": "tiny",
        "model": str(model) if isinstance(model, Path) else model,
        "data": data,
        "calibration": {"num_samples": 8, "sequence_length": 32},
        **{name: SECTIONS[name] for name in LEVELS[level]},
        "runtime": {"workspace": str(workspace), "device": "cpu", "threads": 1},
        **changes,
    }
    path.write_text(yaml.safe_dump(values))
    return path
