"""What a run prints for the user to type works as it stands."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from sqft.cli import run_command_line

CASES: dict[str, tuple[str, dict[str, Any] | None]] = {
    "sparse + lora": ("shears", None),
    "sparse INT4 + lora": ("sqft", None),
    "sparse": ("sparse_peft", None),
    "sparse INT4": ("qa_sparse_peft", None),
    "asymmetric INT4": (
        "qa_sparse_peft",
        {"quantize": {"method": "rtn", "group_size": 32, "symmetric": False}},
    ),
    "dense + lora": ("shears", {"sparsify": None}),
    "dense, merged": ("sparse_peft", {"sparsify": None}),
    "compressed only": ("sqft", {"adapters": None, "train": None, "search": None}),
}


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
@pytest.mark.parametrize("case", CASES)
def test_printed_code_runs(
    case: str,
    shared_values: Callable[..., dict[str, Any]],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pipeline, changes = CASES[case]
    values = shared_values(pipeline, tiny_model_dir("llama")) | (changes or {})
    values = {key: value for key, value in values.items() if value is not None}
    values |= {"evaluate": None, "name": f"case-{list(CASES).index(case)}"}
    values.get("search", {}).update(method="median", num_trials=20)
    values["train"] = values.get("train") and values["train"] | {"max_steps": 1}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in values.items() if value}))
    assert run_command_line(["run", str(path)]) == 0
    shown = capsys.readouterr().out.splitlines()
    start = next(place for place, line in enumerate(shown) if line.startswith("use it:"))
    code = [line[13:] for line in shown[start:] if line.startswith(("use it:", " "))]
    names: dict[str, Any] = {}
    exec("\n".join(code), names)
    assert names["model"](torch.arange(4, 20)[None]).logits.isfinite().all()
    verify = [line.removeprefix("verify it:") for line in shown if line.startswith("verify it:")]
    assert bool(verify) == pipeline.endswith("sparse_peft")
    for command in verify:
        assert run_command_line(shlex.split(command)[1:]) == 0
