"""Large inputs: a million training lines; 2,030 linears in 200 files; a stage whose record has 100 MB.

    python -m benchmarks.scale [--items N] [--part items|layers|record] --json FILE

items: reading, formatting, splitting and writing them; the tokenizer's own time is taken apart. layers: a
model of 290 small blocks is planned, made sparse and quantized. record: a finished stage with that record is
listed by `status`, and found by another run. Times are of the processor, memory is the peak of the process.
"""

import json
import random
import resource
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.common import check, checks_table, environment, make_parser, parse_options, write_result
from benchmarks.tiny import write_model
from benchmarks.warm import run_child
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from sqft.artifacts import Manifest
from sqft.cli import run_command_line
from sqft.data import load_splits, write_items
from sqft.directories import new_directory
from sqft.sections import DataSection

SECONDS_PER_MILLION = 60
BLOCKS, SHARDS, RECORD = 290, 200, 100 * 2**20
WORDS = "the a of to and in that is was he for it with as his on be at by i this had not are but".split()  # noqa: SIM905


def items(folder: Path, count: int) -> list[dict[str, Any]]:
    """Questions of 18 words and answers of three, read as a stage reads them; a word is about a token."""
    path, draw = folder / "items.jsonl", random.Random(0)
    with path.open("w") as file:
        for number in range(count):
            question = " ".join(draw.choices(WORDS, k=18))
            item = {"question": f"{question} {number}?", "answer": " ".join(draw.choices(WORDS, k=3))}
            file.write(json.dumps(item) + "\n")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=2000, special_tokens=["</s>"], show_progress=False)
    core.train_from_iterator(islice(path.open(), 2000), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    kind, inside = type(tokenizer), [0.0]
    original = kind.__call__

    def timed(self: Any, *arguments: Any, **options: Any) -> Any:
        started = time.process_time()
        found = original(self, *arguments, **options)
        inside[0] += time.process_time() - started
        return found

    kind.__call__ = timed
    section = DataSection(train=str(path), prompt="question: {question} answer: ", sequence_length=512)
    (folder / "out").mkdir()
    started = time.process_time()
    write_items(folder / "out", load_splits(section, tokenizer, seed=0))
    seconds = time.process_time() - started - inside[0]
    kind.__call__ = original
    peak = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    share = count / 1e6
    return [
        check(
            f"{count:,} items: seconds, the tokenizer's {inside[0]:.0f} apart", seconds, at_most=60 * share
        ),
        check(f"{count:,} items: peak GiB", peak / 2**30, at_most=2.0),
    ]


def layers(folder: Path, count: int) -> list[dict[str, Any]]:
    """A model of many small linears in many files, planned and compressed."""
    model = write_model(folder / "model")
    values = json.loads((model / "config.json").read_text()) | {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": BLOCKS, "head_dim": 8,
    }  # fmt: skip
    (model / "config.json").write_text(json.dumps(values))
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).bfloat16().save_pretrained(model)
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    names = sorted(tensors)
    where: dict[str, str] = {}
    for shard in range(SHARDS):
        part = {name: tensors[name] for name in names[shard::SHARDS]}
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(part, model / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    recipe = _recipe(folder, model)
    linears = 7 * BLOCKS
    return [
        check(f"{linears:,} linears in {SHARDS} files: plan, seconds", _run("plan", str(recipe)), at_most=60),
        check(f"{linears:,} linears in {SHARDS} files: run, seconds", _run("run", str(recipe)), at_most=600),
    ]


def record(folder: Path, count: int) -> list[dict[str, Any]]:
    """A finished stage whose manifest is huge."""
    recipe = _recipe(folder, write_model(folder / "model"))
    _run("run", str(recipe))
    (stage,) = (folder / "runs" / "stages").glob("sparsify-*")
    manifest = Manifest.read(stage)
    manifest.metrics["notes"] = ["0" * 1000] * (RECORD // 1003)
    with new_directory(stage, about={"stage": manifest.key}) as partial:
        for name in manifest.files:
            (partial / name).write_bytes((stage / name).read_bytes())
        manifest.write(partial)
    size = (stage / "manifest.json").stat().st_size / 2**20
    return [
        check(
            f"a record of {size:.0f} MiB: status, seconds", _run("status", str(folder / "runs")), at_most=5
        ),
        check(f"a record of {size:.0f} MiB: run again, seconds", _run("run", str(recipe)), at_most=30),
    ]


def _recipe(folder: Path, model: Path) -> Path:
    values = {
        "model": str(model),
        "sparsify": {"method": "magnitude"},
        "quantize": {"method": "rtn", "group_size": 32},
        "runtime": {"workspace": str(folder / "runs"), "device": "cpu"},
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(values))  # which is YAML too
    return path


def _run(*arguments: str) -> float:
    """Seconds of the processor that a command takes in a child."""
    ended = run_child(lambda: run_command_line(arguments), seconds=900)
    assert ended.code == 0, ended.said
    return ended.seconds


PARTS: dict[str, Callable[[Path, int], list[dict[str, Any]]]] = {
    "record": record,
    "layers": layers,
    "items": items,
}


def main() -> None:
    """Make the large inputs and use them."""
    parser = make_parser(__doc__)
    parser.add_argument("--items", type=int, default=1_000_000)
    parser.add_argument("--part", choices=list(PARTS), action="append", help="only this one")
    options = parse_options(parser)
    here = environment()
    checks: list[dict[str, Any]] = []
    for name in options.part or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            checks += PARTS[name](Path(folder), options.items)
    print(checks_table(checks))
    write_result(options.json, {"environment": here, "checks": checks})


if __name__ == "__main__":
    main()
