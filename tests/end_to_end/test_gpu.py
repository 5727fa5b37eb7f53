"""What must hold on a GPU (`pytest -m gpu`); without one the same runs on the CPU, in a GPU's types."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor

import sqft.models.loading as loading
import sqft.training.arguments as arguments
from sqft.adapters import merge_adapters
from sqft.cli import run_command_line
from sqft.models import load_trainable
from sqft.pipeline import RunResult, parse_recipe, run_recipe
from sqft.training import trainer as trainer_module

Values = Callable[..., dict[str, Any]]
MERGED = ["sparse_peft", "qa_sparse_peft"]


@pytest.fixture(autouse=True)
def _compute_in_bfloat16(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if device == "cpu":
        for module in (loading, arguments):
            monkeypatch.setattr(module, "computes_in_bfloat16", lambda device: True)


def run(values: dict[str, Any], device: str) -> RunResult:
    values["runtime"]["device"] = device
    values |= {"search": {"method": "median"}, "evaluate": {"models": ["base"], "max_new_tokens": 2}}
    if values["adapters"]["method"] != "lora" and device == "cuda":  # Triton's interpreter takes its time
        values["adapters"]["kernels"] = "triton"
    return run_recipe(parse_recipe(values))


def directories(result: RunResult) -> dict[str, Path]:
    """The stages, and under "base" the one that the adapters stand on."""
    stages = {stage.name: stage.directory for stage in result.stages}
    return stages | {"base": stages.get("quantize", stages["sparsify"])}


@pytest.mark.parametrize("pipeline", MERGED)
def test_a_run_trains_in_bfloat16_and_the_cpu_verifies_it_and_merges_alike(
    pipeline: str, device: str, recipe_values: Values, tiny_model_dir: Callable[..., Path]
) -> None:
    result = run(recipe_values(pipeline, tiny_model_dir("llama")), device)
    stages = directories(result)
    trained = json.loads((stages["train"] / "training.json").read_text())
    assert "bfloat16" in trained["environment"]["dtype"]
    assert trained["environment"]["device"].startswith(device)
    assert all(torch.isfinite(torch.tensor([step["loss"] for step in trained["steps"]])))
    assert result.data.passed
    differing, of = json.loads((stages["train"] / "manifest.json").read_text())["metrics"]["differing_codes"]
    assert differing <= of * 1e-5
    assert of > 0
    assert result.model_dir is not None
    proof = ["--base", str(stages["base"]), "--adapter", str(stages["search"] / "adapter")]
    assert run_command_line(["verify", str(result.model_dir), *proof]) == 0

    merged = []
    for place in (device, "cpu"):
        loaded = load_trainable(stages["base"], device=place)
        model = PeftModel.from_pretrained(loaded, stages["train"] / "adapter")
        merged.append({name: _stored(weight) for name, weight in merge_adapters(model).items()})
    assert merged[0].keys() == merged[1].keys()
    assert sum(int((merged[0][name] != merged[1][name]).sum()) for name in merged[0]) == 0


def _stored(weight: Any) -> Tensor:
    found: Tensor = weight.weight if isinstance(weight.weight, Tensor) else weight.weight.codes
    return found.cpu()


def adapter_of(result: RunResult) -> dict[str, Tensor]:
    return load_file(directories(result)["train"] / "adapter" / "adapter_model.safetensors")


class Killed(BaseException):
    """Stands for a kill: nothing in the library catches it."""


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.slow), pytest.param("cuda", marks=pytest.mark.gpu)],
    indirect=True,
)
@pytest.mark.parametrize("pipeline", ["shears", *MERGED])
def test_a_killed_training_resumes_to_the_same_bits(
    pipeline: str,
    device: str,
    recipe_values: Values,
    tiny_model_dir: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = recipe_values(pipeline, tiny_model_dir("llama"))
    values["adapters"]["dropout"] = 0.1
    values["train"]["gradient_checkpointing"] = True
    whole = adapter_of(run(values, device))
    values["runtime"]["workspace"] += "-killed"
    plain = trainer_module.StepCallback.on_step_begin

    def kill(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            raise Killed
        plain(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module.StepCallback, "on_step_begin", kill)
        with pytest.raises(Killed):
            run(values, device)
    resumed = run(values, device)
    assert whole.keys() == (found := adapter_of(resumed)).keys()
    assert all(torch.equal(whole[name], found[name]) for name in whole)
