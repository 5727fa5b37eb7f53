"""The whole files that tries begin with: a model, adapters, a merge, its exports, its packed form."""

import json
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from benchmarks.tiny import write_model, write_recipe
from benchmarks.warm import run_child
from safetensors.torch import save_file

from sqft.artifacts import digest_files
from sqft.cli import run_command_line

__all__ = ["EXPORTS", "Sources"]

EXPORTS = ("compressed-tensors", "gptq", "safetensors", "gguf", "openvino")
Q4_1 = {"method": "rtn", "group_size": 32, "symmetric": False, "scale_bits": 7}
LINEARS = {"self_attn.q_proj": (64, 64), "mlp.up_proj": (128, 64)}
RANK, ALPHA = 4, 8


@dataclass
class Sources:
    """Made where they are first asked for, each in a child, so that this process stays as it is."""

    root: Path
    digests: dict[Path, dict[str, str]] = field(default_factory=dict)

    @cached_property
    def model(self) -> Path:
        """A Llama of two blocks with its tokenizer."""
        return write_model(self.root / "model")

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """A recipe of all stages but export, as values."""
        return self._recipe("run")

    @cached_property
    def workspace(self) -> Path:
        """Where that recipe ran."""
        values = self.recipe
        path = self.root / "run" / "recipe.yaml"
        path.write_text(yaml.safe_dump(values))
        self._command("run", str(path))
        return Path(values["runtime"]["workspace"])

    @cached_property
    def merged(self) -> Path:
        """The certified model that came of it."""
        return self.workspace / "tiny" / "merged"

    @cached_property
    def adapter(self) -> Path:
        """The adapter that was merged into it."""
        return self.workspace / "tiny" / "adapter"

    @cached_property
    def base(self) -> Path:
        """The model that the adapter was trained on."""
        return next((self.workspace / "stages").glob("quantize-*"))

    @cached_property
    def packed(self) -> Path:
        """The merged model, packed."""
        self._command("pack", str(self.merged), "--output", str(self.root / "packed"))
        return self.root / "packed"

    @cached_property
    def signed(self) -> tuple[Path, Path]:
        """A copy of the merged model that is signed, and the public key."""
        import subprocess

        key, copy = self.root / "key", self.root / "signed"
        shutil.copytree(self.merged, copy)
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(key)], check=True)
        self._command("sign", str(copy), "--key", str(key))
        return copy, key.with_name("key.pub")

    @cached_property
    def lora(self) -> Path:
        """A plain LoRA adapter for the model, as PEFT writes it."""
        directory = self.root / "lora"
        directory.mkdir()
        torch.manual_seed(1)
        factors = {}
        for block in range(2):
            for name, (rows, columns) in LINEARS.items():
                key = f"base_model.model.model.layers.{block}.{name}.lora_"
                factors[f"{key}A.weight"] = torch.randn(RANK, columns) * 0.1
                factors[f"{key}B.weight"] = torch.randn(rows, RANK) * 0.1
        save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
            "target_modules": ["q_proj", "up_proj"], "lora_dropout": 0.0, "fan_in_fan_out": False,
            "use_dora": False, "use_rslora": False, "rank_pattern": {"mlp.up_proj": RANK},
            "alpha_pattern": {}, "modules_to_save": None, "init_lora_weights": True, "inference_mode": True,
            "base_model_name_or_path": str(self.model),
        }  # fmt: skip
        (directory / "adapter_config.json").write_text(json.dumps(config))
        return directory

    def export(self, format: str) -> Path:
        """An export of the merged model."""
        place = self.root / f"export-{format}"
        if not place.exists():
            self._command("export", str(self.merged), "--to", format, "--output", str(place))
        return place

    def digest(self, directory: Path) -> dict[str, str]:
        """The digests of a whole directory, taken once."""
        if directory not in self.digests:
            self.digests[directory] = digest_files(directory)
        return self.digests[directory]

    def write_recipe(self, folder: Path, **changes: Any) -> Path:
        """A small recipe in a folder of its own: magnitude, no training; changes are whole sections."""
        values = {
            "name": "tiny",
            "model": str(self.model),
            "sparsify": {"method": "magnitude"},
            "runtime": {"workspace": str(folder / "runs"), "device": "cpu", "threads": 1},
        }
        path = folder / "recipe.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return path

    def _recipe(self, name: str) -> dict[str, Any]:
        folder = self.root / name
        folder.mkdir()
        path = write_recipe(
            folder / "recipe.yaml", self.model, folder / "runs", "train, search and merge",
            quantize=Q4_1, evaluate={"batch_size": 8, "max_new_tokens": 4},
        )  # fmt: skip
        values: dict[str, Any] = yaml.safe_load(path.read_text())
        return values

    def _command(self, *arguments: str) -> None:
        ended = run_child(lambda: run_command_line(arguments), seconds=300)
        assert ended.code == 0, ended.said
