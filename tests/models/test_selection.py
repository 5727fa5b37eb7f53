"""Which linears a recipe or an adapter means: names, patterns, all-linear, regular expressions."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import get_peft_model
from pydantic import ValidationError

from sqft.adapters import SqftConfig, attach_adapters
from sqft.errors import AdapterError, ModelError
from sqft.models import load_model
from sqft.models.blocks import target_linears
from sqft.models.names import select_names
from sqft.sections import AdapterSection, SparsifySection

NAMES = [f"model.layers.{n}.{end}" for n in (0, 1) for end in ("attn.q_proj", "attn.k_proj", "mlp.up_proj")]


@pytest.mark.parametrize(
    ("wanted", "count", "unknown"),
    [
        ("all-linear", 6, []),
        ("q_proj", 2, []),
        ("layers.1.mlp.up_proj", 1, []),
        (r".*\.[qk]_proj", 4, []),
        (r"model\.layers\.0\..*", 3, []),
        (r"[qk]_proj", 0, [r"[qk]_proj"]),  # as PEFT, over the whole name
        (["q_proj", "layers.0.*"], 4, []),
        (["q_proj", "zz"], 2, ["zz"]),
        ([], 0, []),
    ],
)
def test_what_is_meant(wanted: str | list[str], count: int, unknown: list[str]) -> None:
    chosen, missing = select_names(NAMES, wanted)
    assert (len(chosen), missing) == (count, unknown)


def test_an_expression_that_never_ends_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sqft.models.names.SECONDS", 0.1)
    with pytest.raises(ModelError, match=r"'\[' cannot be used"):
        select_names(NAMES, "[")
    with pytest.raises(ModelError, match="longer than"):
        select_names(["a" * 40 + "!"], "(a+)+b")


@pytest.mark.parametrize(
    ("targets", "left_out", "ends"),
    [
        ("all-linear", [], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("all-linear", r".*\.mlp\..*", {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (r".*\.(up|down)_proj", ["layers.0.*"], {"up_proj", "down_proj"}),
        (None, ["up_proj"], {"q_proj", "k_proj", "v_proj", "down_proj"}),
    ],
)
def test_adapters_stand_on_what_is_meant(
    targets: str | None, left_out: list[str] | str, ends: set[str], tiny_model_dir: Callable[..., Path]
) -> None:
    section = AdapterSection(method="lora", ranks=[4], target_modules=targets, skip_modules=left_out)
    adapted = attach_adapters(load_model(tiny_model_dir("llama")), section)
    config: Any = adapted.peft_config["default"]
    assert {name.rpartition(".")[2] for name in config.target_modules} == ends
    assert any(".layers.0." in name for name in config.target_modules) == (left_out != ["layers.0.*"])
    assert config.exclude_modules is None


def test_peft_users_write_it_as_they_are_used_to(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    config = SqftConfig(method="lora", target_modules="all-linear", exclude_modules=["o_proj"])
    adapted = get_peft_model(load_model(tiny_model_dir("llama")), config)
    adapted.save_pretrained(tmp_path)
    again = SqftConfig.from_pretrained(tmp_path)
    assert len(again.target_modules) == 12
    assert config.target_modules == "all-linear"
    with pytest.raises(AdapterError, match="no linear layer is called zz"):
        get_peft_model(load_model(tiny_model_dir("llama")), SqftConfig(exclude_modules=["zz"]))
    with pytest.raises(AdapterError, match="leaves no linear"):
        get_peft_model(load_model(tiny_model_dir("llama")), SqftConfig(exclude_modules="all-linear"))


def test_compression_takes_the_same(tiny_model_dir: Callable[..., Path]) -> None:
    model = load_model(tiny_model_dir("llama"))
    assert len(target_linears(model, "all-linear", r".*\.o_proj")) == 12
    assert len(target_linears(model, r".*layers\.1.*_proj", ["down_proj"])) == 6
    with pytest.raises(ModelError, match=r"called '\.\*zz'"):
        target_linears(model, ".*zz", [])
    with pytest.raises(ValidationError, match="not a regular expression"):
        SparsifySection(skip_modules="(")
