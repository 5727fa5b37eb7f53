"""The paper's recipes at full scale, as far as no weights are needed: each is planned from the architectures'
configurations alone, and trains three steps on random models of the same architectures, cut down.

Cut to two blocks, a vocabulary of 1,000 and an eighth of the width: heads, hidden and intermediate sizes by
one factor, so that heads keep their size and each linear its proportions. At full width each block of each of
some twenty quantized models takes GPTQ an inverse of 14336 x 14336, about 80 s on one thread (1.2 s at a
quarter of that).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sqft.cli import run_command_line
from sqft.pipeline import plan_recipe
from sqft.pipeline.reproduction import experiment_names, load_experiment
from sqft.pipeline.sweep import Sweep
from sqft.pipeline.sweep_run import run_sweep
from sqft.report import read_report

pytestmark = pytest.mark.slow

EXPERIMENTS = experiment_names("full")
# As each model's config.json on the hub has it; what is not here is the architecture's default.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 8192, "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "mistral-7b": {
        "model_type": "mistral", "architectures": ["MistralForCausalLM"], "vocab_size": 32768,
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
    "phi-3-mini": {
        "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "vocab_size": 32064,
        "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False, "dtype": "bfloat16",
    },
}  # fmt: skip
PARAMETERS = {"llama-3-8b": 8_030_261_248, "mistral-7b": 7_248_023_552, "phi-3-mini": 3_821_079_552}
MODELS = {  # the one that an experiment names at its top, and those of its axis
    "math": ("mistral-7b", ["mistral-7b", "phi-3-mini"]),
    "commonsense": ("phi-3-mini", []),
    "gsm8k": ("llama-3-8b", ["llama-3-8b", "mistral-7b"]),
}
WIDTH = 8
SCALED = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
CUT = {"vocab_size": 1000, "num_hidden_layers": 2, "max_position_embeddings": 128}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every file that the recipes and their tasks name, with a few invented records."""
    root = tmp_path_factory.mktemp("full-scale") / "data"
    tasks = ["boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa"]
    for name in ("gsm8k", "math", "commonsense", "svamp", "mawps", *tasks):
        (root / name).mkdir(parents=True)
        for split, first, last in (("train", 0, 60), ("test", 60, 80)):
            asked = [(f"what is {n}?", f"{n}") for n in range(first, last)]
            rows = [{"question": text, "instruction": text, "answer": answer} for text, answer in asked]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (root / name / f"{split}.jsonl").write_text(lines)
    (root / "c4.txt").write_text("the quick brown fox jumps over the lazy dog and runs home " * 2000)
    return root


def experiment(name: str, data: Path, model: Callable[[str], Path], overrides: list[str]) -> Sweep:
    """An experiment whose models lie here."""
    top, axis = MODELS.get(name, ("llama-3-8b", []))
    models = [f"model={model(top)}", *(f"sweep.axes.model.{one}.model={model(one)}" for one in axis)]
    runtime = f"runtime={{workspace: {data.parent / 'runs'}, device: cpu}}"
    return load_experiment(name, "full", data, [*models, runtime, *overrides])


@pytest.fixture(scope="module")
def configuration(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a model of which nothing is there but its config.json."""
    root = tmp_path_factory.mktemp("configurations")

    def find(name: str) -> Path:
        (root / name).mkdir(exist_ok=True)
        (root / name / "config.json").write_text(json.dumps(CONFIGURATIONS[name]))
        return root / name

    return find


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_is_planned_from_a_config_alone(
    name: str, data: Path, configuration: Callable[[str], Path]
) -> None:
    sweep = experiment(name, data, configuration, [f"calibration.source={data / 'c4.txt'}"])
    for cell in sweep.cells:
        planned = plan_recipe(cell.recipe)
        assert not planned.has_weights
        assert planned.num_parameters == PARAMETERS[Path(planned.model).name]
        if cell.recipe.adapters:
            assert sum(module.count for module in planned.modules if module.rank) in (32, 5 * 32)


def test_the_plan_says_what_is_missing(
    data: Path, configuration: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import yaml

    sweep = experiment("commonsense", data, configuration, [f"calibration.source={data / 'c4.txt'}"])
    recipe = sweep.cells[-1].recipe.model_dump(mode="json", exclude_none=True)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert run_command_line(["plan", str(tmp_path / "recipe.yaml")]) == 0
    shown = capsys.readouterr().out
    assert "3821.1 M parameters" in shown
    assert "has a config and no weights: a run needs them" in shown
    assert "its tokenizer is not at hand" in shown


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_trains_three_steps(name: str, data: Path, tiny_model_dir: Callable[..., Path]) -> None:
    """One item of at most 64 tokens a step. What experiments have in common is made once."""

    def cut(model: str) -> Path:
        settings = CONFIGURATIONS[model]
        shape = {key: settings[key] // WIDTH for key in SCALED}
        return tiny_model_dir(settings["model_type"], **CUT, **shape)

    overrides = [
        "data.prompt={question}\n" if name not in ("math", "commonsense") else "data.prompt={instruction}\n",
        "data.test_items=4" if name in ("math", "commonsense") else "data.search_items=4",
        "data.search_items=4", "data.sequence_length=64",
        "calibration={source: train, num_samples: 2, sequence_length: 64}",
        "train.max_steps=3", "train.batch_size=1", "train.gradient_accumulation=1",
        "evaluate={max_items: 2, max_new_tokens: 2, general_text: null}",
    ]  # fmt: skip
    sweep = experiment(name, data, cut, overrides)
    result = run_sweep(sweep)
    assert result.failed == {}
    for cell in sweep.cells:
        report = read_report(result.done[cell.name])
        assert report.passed in (None, True)
        assert not cell.recipe.adapters or report.training[-1][0] == 3
