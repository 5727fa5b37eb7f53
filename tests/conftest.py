"""Tiny random models and a tiny tokenizer, made on the spot: no test needs a network or a download."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.gpu.interpreter import use_interpreter
from jaxtyping import install_import_hook

import tests.shapes

SOURCE = Path(__file__).parents[1] / "src" / "sqft"
# Before anything of sqft is imported. Triton reads the source of its kernels again, and finds no hook there.
CHECKED = [f"sqft.{path.name}" for path in SOURCE.iterdir() if path.is_dir() and path.name != "kernels"]
install_import_hook(CHECKED, f"{tests.shapes.__name__}.check_shapes")
# What a test writes need not outlive a power cut; benchmarks.faults plays one in processes of its own.
os.fsync = lambda descriptor: None  # type: ignore[assignment]
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # tiny tensors gain nothing from more than one
if not torch.cuda.is_available():
    use_interpreter()  # before what follows imports Triton

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

ARCHITECTURES = ["llama", "mistral", "phi3"]
MORE_ARCHITECTURES = ["qwen2", "qwen3", "gemma2"]
TEXT = [
    "question: what is 3 plus 4? answer: 7",
    "the quick brown fox jumps over the lazy dog and runs home",
    "a model is fine-tuned once and gives one small file",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def _tokenizer() -> PreTrainedTokenizerFast:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<pad>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=288, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    core.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", pad_token="<pad>", model_max_length=512
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(arch: str, **changes: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    if arch in {"qwen3", "gemma2"}:
        settings["head_dim"] = 16
    return AutoConfig.for_model(arch, **(settings | changes))


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model_dir(arch, *, seed=0, dtype="bfloat16", **config_changes)`: a model directory, made once.

    A random decoder of the architecture (llama, mistral, phi3, qwen2, qwen3, gemma2): two blocks, hidden size
    64, intermediate size 128, 288 tokens. Do not write into it; copy it first.
    """
    made: dict[str, Path] = {}

    def make(arch: str = "llama", *, seed: int = 0, dtype: str = "bfloat16", **changes: Any) -> Path:
        key = f"{arch}-{seed}-{dtype}-{sorted(changes.items())}"
        if key not in made:
            directory = tmp_path_factory.mktemp(arch)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = AutoModelForCausalLM.from_config(_config(arch, **changes), dtype=torch.float32)
                for name, parameter in model.named_parameters():
                    if "norm" not in name:  # larger than the default, so that layers matter
                        torch.nn.init.normal_(parameter, std=0.12)
            model.to(getattr(torch, dtype)).save_pretrained(directory)
            _tokenizer().save_pretrained(directory)
            made[key] = directory
        return made[key]

    return make


@pytest.fixture(scope="session")
def merged_dir(
    tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`merged_dir(arch="llama", **changes)`: do not write into what it returns."""
    from tests.merged_models import write_merge

    made: dict[str, Path] = {}

    def make(arch: str = "llama", **changes: Any) -> Path:
        key = f"{arch}-{sorted(changes.items())}"
        if key not in made:
            root = tmp_path_factory.mktemp("merge")
            made[key] = write_merge(tiny_model_dir(arch), root, **changes).merged
        return made[key]

    return make


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """The test runs on the CPU, with Triton's interpreter, and with `pytest -m gpu` on a GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use")
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off where there is a GPU; pytest -m gpu runs this on it")
    return str(request.param)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test draws the same random numbers, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _without_plots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the plots out of reports that no test looks at: they take a third of a tiny run's time.

    They are drawn in tests/report, by the demo, and by what the README and the tutorials show.
    """
    if request.path.parent.name in {"pipeline", "end_to_end"}:
        monkeypatch.setattr("sqft.report.page.draw_plots", lambda data: [])


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer of every tiny model: bytes and a few merges, `<pad>` 0, `</s>` 1, a chat template."""
    return _tokenizer()
