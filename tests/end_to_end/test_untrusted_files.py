"""Files of others that mean harm, or are broken: one line and exit 2, at once."""

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from sqft.cli import run_command_line

Edit = Callable[[Path], Any]


def config(**changes: Any) -> Edit:
    def edit(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Edit:
    def edit(model: Path) -> None:
        path = model / "model.safetensors"
        stored = load_file(path)
        change(stored)
        save_file(stored, path, metadata={"format": "pt"})

    return edit


def index(name: str) -> Edit:
    def edit(model: Path) -> None:
        names = load_file(model / "model.safetensors")
        shutil.move(model / "model.safetensors", model.parent / "outside.safetensors")
        (model / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": dict.fromkeys(names, name.replace("PARENT", str(model.parent)))})
        )

    return edit


def template(text: str) -> Edit:
    return lambda model: (model / "chat_template.jinja").write_text(text)


ENDLESS = "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}"
MODELS: dict[str, tuple[Edit, str]] = {
    "a billion blocks": (config(num_hidden_layers=10**9), "num_hidden_layers is 1,000,000,000"),
    "a billion labels": (config(num_labels=10**9), "num_labels is 1,000,000,000"),
    "above its folder": (index("../outside.safetensors"), "not a file of this directory"),
    "elsewhere": (index("PARENT/outside.safetensors"), "not a file of this directory"),
    "weights are a pipe": (
        lambda m: ((m / "model.safetensors").unlink(), os.mkfifo(m / "model.safetensors")),
        "model.safetensors",
    ),
    "a type that nobody computes with": (
        tensors(lambda t: t.update({k: v.to(torch.uint16) for k, v in t.items() if "q_proj" in k})),
        "of the type U16",
    ),
    "endless template": (
        template("{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}"),
        "template",
    ),
    "failing template": (template("{{ messages[7].content.x }}"), "template"),
    "template that raises": (template("{{ raise_exception('no') }}"), "template"),
    "broken template": (template("{% for %}"), "template"),
    "tokenizer of a wrong type": (lambda m: (m / "tokenizer.json").write_text("[1]"), "tokenizer"),
    "tokenizer without a model": (lambda m: (m / "tokenizer.json").write_text('{"model": 3}'), "tokenizer"),
    "deep config": (lambda m: (m / "config.json").write_text("[" * 100_000), "config.json"),
}


@pytest.fixture
def refused(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> Callable[..., str]:
    """`refused(edit, **sections)`: the line that a run of a model so edited ends with."""
    monkeypatch.setattr("sqft.data.conversations.TEMPLATE_SECONDS", 0.3)

    def run(edit: Edit = lambda model: None, **sections: Any) -> str:
        model = Path(shutil.copytree(tiny_model_dir("llama"), tmp_path / "model", dirs_exist_ok=True))
        edit(model)
        items = ({"question": f"what is {i}?", "answer": str(i)} for i in range(60))
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, items)))
        values = {
            "model": str(model),
            "data": {"train": str(tmp_path / "train.jsonl"), "template": "chat", "prompt": "{question}"},
            "sparsify": {"method": "magnitude"},
            "adapters": {"method": "sparse_peft", "ranks": [4]},
            "train": {"max_steps": 1},
            "runtime": {"workspace": str(tmp_path / "runs"), "device": "cpu"},
        }
        values |= sections
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(values))
        started = time.process_time()
        assert run_command_line(["run", str(recipe)]) == 2
        assert time.process_time() - started < 20
        said = capsys.readouterr().err
        lines = [line for line in said.splitlines() if line.startswith("sqft: ") and "WARNING" not in line]
        assert len(lines) == 1
        assert lines[0].isprintable()
        return lines[0]

    return run


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, refused: Callable[..., str]) -> None:
    edit, words = MODELS[name]
    assert words in refused(edit)


def test_numbers_that_are_none_where_nothing_is_compressed(refused: Callable[..., str]) -> None:
    def edit(stored: dict[str, torch.Tensor]) -> None:
        stored["model.embed_tokens.weight"][0, 0] = float("nan")

    assert "model.embed_tokens.weight holds NaN" in refused(tensors(edit), adapters=None, train=None)


def test_pipes_and_devices_as_data(refused: Callable[..., str], tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    for path in (str(tmp_path / "pipe.jsonl"), "/dev/zero"):
        assert "file" in refused(data={"train": path})
        assert "not a regular file" in refused(evaluate={"perplexity": path})


def test_names_that_are_none(refused: Callable[..., str]) -> None:
    assert "nouser" in refused(model="~nouser-of-this-machine/model")
    assert "workspace" in refused(runtime={"workspace": "a\0b"})


@pytest.mark.parametrize(
    "text",
    [
        "model: a\nmodel: b",
        "a: &a [*a]",
        "[" * 5000,
        "model: 2001-99-99",
        "seed: " + "9" * 5000,
        "a: !!int x",
    ],
)
def test_recipes(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "recipe.yaml").write_text(text)
    assert run_command_line(["plan", str(tmp_path / "recipe.yaml")]) == 2
    assert "recipe.yaml" in capsys.readouterr().err


def test_escape_codes_are_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = tmp_path / "\x1b]0;owned\x07.yaml"
    assert run_command_line(["plan", str(name)]) == 2
    assert "\x1b" not in capsys.readouterr().err


ADAPTERS: dict[str, dict[str, Any]] = {
    "rank 0": {"r": 0},
    "rank as text": {"r": "4"},
    "no rank": {"r": None},
    "alpha NaN": {"lora_alpha": float("nan")},
    "alpha infinite": {"lora_alpha": float("inf")},
    "bad pattern": {"rank_pattern": {"(": 3}},
    "endless pattern": {"rank_pattern": {"(.*.*.*.*.*.*)*x": 3}},
    "patterns as a list": {"rank_pattern": [1]},
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_adapters(
    name: str, tmp_path: Path, tiny_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    settings: dict[str, Any] = {
        "peft_type": "LORA",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
    } | ADAPTERS[name]
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    factors = {f"{key}A.weight": torch.ones(4, 64), f"{key}B.weight": torch.ones(64, 4)}
    (tmp_path / "adapter").mkdir()
    save_file(factors, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    command = ["merge", "--base", str(tiny_model_dir("llama")), "--adapter", str(tmp_path / "adapter")]
    started = time.process_time()
    assert run_command_line([*command, "--output", str(tmp_path / "out")]) == 2
    assert time.process_time() - started < 20
    assert "scaling" in capsys.readouterr().err
