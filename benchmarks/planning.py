"""What `sqft plan` says that each stage needs in memory, against what it takes, on models of random weights.

    python -m benchmarks.planning [--size 45M|0.3B|1B] [--recipe NAME] --json FILE

Each recipe is planned from the model's config.json alone and then run, in a process of its own. Measured is
the most anonymous memory that a stage holds, beyond what the process held before it. Not counted are pages of
mapped files, which the system takes back when it needs memory, and memory that was freed and the allocator
keeps: it is told to give back every piece of a megabyte.
"""

import ctypes
import gc
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from benchmarks.common import (
    check,
    checks_table,
    environment,
    make_parser,
    markdown_table,
    parse_options,
    write_result,
)
from benchmarks.tiny import write_model
from benchmarks.warm import import_everything, run_child
from safetensors.torch import save_file

from sqft.pipeline import parse_recipe, plan_recipe, run_recipe, runner

# (hidden, intermediate, blocks, vocabulary). One block is compressed at a time, so two show what many take.
SIZES = {
    "45M": (768, 2048, 5, 4096),
    "0.3B": (2048, 5632, 2, 49152),
    "1B": (2048, 8192, 14, 32000),
}
ADAPTERS: dict[str, Any] = {
    "train": {"max_steps": 2, "batch_size": 4, "learning_rate": 1e-3},
    "evaluate": {"models": ["merged"], "batch_size": 4, "max_items": 4, "max_new_tokens": 2},
}
GPTQ = {"method": "gptq", "group_size": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "magnitude, rtn": {"sparsify": {"method": "magnitude"}, "quantize": {"method": "rtn", "group_size": 32}},
    "wanda, gptq, qa_sparse_peft": {
        "sparsify": {"method": "wanda"},
        "quantize": GPTQ,
        "adapters": {"method": "qa_sparse_peft", "ranks": [16]},
        **ADAPTERS,
    },
    "ria, sparse_peft": {
        "sparsify": {"method": "ria"},
        "adapters": {"method": "sparse_peft", "ranks": [16]},
        **ADAPTERS,
    },
    "sparsegpt, lora": {
        "sparsify": {"method": "sparsegpt"},
        "adapters": {"method": "lora", "ranks": [16]},
        **(ADAPTERS | {"evaluate": ADAPTERS["evaluate"] | {"models": ["adapted"]}}),
    },
    "joint, scales": {
        "quantize": GPTQ | {"method": "joint"},
        "adapters": {"method": "scales"},
        **(ADAPTERS | {"train": {"max_steps": 2, "batch_size": 4}}),
    },
    "wanda, lora": {
        "sparsify": {"method": "wanda"},
        "adapters": {"method": "lora", "ranks": [16]},
        **(ADAPTERS | {"evaluate": ADAPTERS["evaluate"] | {"models": ["adapted"]}}),
    },
    "long items": {
        "sparsify": {"method": "magnitude"},
        "adapters": {"method": "sparse_peft", "ranks": [16]},
        "data": {"sequence_length": 512, "answer": "{answer} " * 200},
        **(ADAPTERS | {"evaluate": ADAPTERS["evaluate"] | {"models": ["adapted"]}}),
    },
    "gptaq": {"quantize": GPTQ | {"method": "gptaq"}},
}
WITHIN = 0.25
MMAP_THRESHOLD = -3  # of mallopt
SMALL = 64 * 2**20  # below, a share says nothing


def write_random_model(directory: Path, size: str) -> Path:
    """A Llama of this size with normal weights in bfloat16, and the tokenizer of the tiny one."""
    hidden, intermediate, blocks, vocabulary = SIZES[size]
    write_model(directory)
    path = directory / "config.json"
    config = json.loads(path.read_text()) | {
        "hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks,
        "vocab_size": vocabulary, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
        "head_dim": 64,
    }  # fmt: skip
    path.write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = {"model.embed_tokens": (vocabulary, hidden), "lm_head": (vocabulary, hidden)}
    tensors = {"model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}
    for block in range(blocks):
        name = f"model.layers.{block}"
        shapes |= {f"{name}.self_attn.{part}_proj": (hidden, hidden) for part in "qkvo"}
        shapes |= {f"{name}.mlp.{part}_proj": (intermediate, hidden) for part in ("gate", "up")}
        shapes[f"{name}.mlp.down_proj"] = (hidden, intermediate)
        for norm in ("input", "post_attention"):
            tensors[f"{name}.{norm}_layernorm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = torch.randn(shape, dtype=torch.bfloat16) * 0.02
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def recipe_values(name: str, model: Path, folder: Path) -> dict[str, Any]:
    """A recipe for it, with little data: what is measured is what weights take."""
    items = [
        {"question": f"what is {a} plus {b}?", "answer": str(a + b)} for a in range(40) for b in range(6)
    ]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, items)))
    return {
        "name": "planning",
        "model": str(model),
        "data": {
            "train": str(folder / "train.jsonl"), "prompt": "question: {question} ",
            "sequence_length": 32, **RECIPES[name].get("data", {}),
        },
        "calibration": {"num_samples": 32, "sequence_length": 64},
        "runtime": {"workspace": str(folder / "runs"), "device": "cpu"},
        **{section: value for section, value in RECIPES[name].items() if section != "data"},
    }  # fmt: skip


def anonymous_bytes() -> int:
    """The anonymous memory of this process (Linux)."""
    status = Path("/", "proc", "self", "status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("RssAnon")).split()[1])


@contextmanager
def peaks_of_stages() -> Iterator[dict[str, int]]:
    """The most memory that each stage held beyond what was there before it, while it runs."""
    peaks: dict[str, int] = {}
    original, now, ended = runner._run, [""], threading.Event()

    def watch() -> None:
        before, name = 0, ""
        while not ended.wait(0.003):
            held = anonymous_bytes()
            if now[0] != name:
                name, before = now[0], held
            if name:
                peaks[name] = max(peaks.get(name, 0), held - before)

    def run(stage: Any, *arguments: Any) -> Any:
        gc.collect()
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # what is free is held no longer
        now[0] = stage.name
        time.sleep(0.05)  # until the watch has seen what there is before
        try:
            return original(stage, *arguments)
        finally:
            now[0] = ""

    runner._run = run  # type: ignore[assignment]
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peaks
    finally:
        ended.set()
        thread.join()
        runner._run = original


def measure(name: str, model: Path) -> list[dict[str, Any]]:
    """One row a stage of a recipe: planned and measured bytes."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        bare = folder / "bare"
        bare.mkdir()
        for path in model.iterdir():
            if path.suffix != ".safetensors":
                (bare / path.name).write_bytes(path.read_bytes())
        planned = {
            s.name: s.memory_bytes
            for s in plan_recipe(parse_recipe(recipe_values(name, bare, folder))).stages
        }
        found, tiny, warm = folder / "found.json", write_model(folder / "tiny"), folder / "warm"
        warm.mkdir()

        def work() -> int:
            getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(MMAP_THRESHOLD, 2**20)  # glibc
            run_recipe(parse_recipe(recipe_values(name, tiny, warm)))  # loads what is loaded once
            with peaks_of_stages() as peaks:
                run_recipe(parse_recipe(recipe_values(name, model, folder)))
            found.write_text(json.dumps(peaks))
            return 0

        ended = run_child(work, seconds=3000)
        assert ended.code == 0, ended.said
        peaks = json.loads(found.read_text())
    return [
        {"recipe": name, "stage": stage, "planned": planned[stage], "measured": measured}
        for stage, measured in peaks.items()
        if stage != "items"
    ]


def main() -> None:
    """Plan and run the recipes, and compare."""
    parser = make_parser(__doc__)
    parser.add_argument("--size", choices=list(SIZES), default="45M")
    parser.add_argument("--recipe", choices=list(RECIPES), action="append", help="only this one")
    options = parse_options(parser)
    here = environment()
    import_everything()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_random_model(Path(folder) / "model", options.size)
        for name in options.recipe or RECIPES:
            rows += measure(name, model)
            print(rows[-4:], flush=True)
    print(
        markdown_table(
            ["recipe", "stage", "planned, MiB", "measured, MiB", "planned / measured"],
            [
                [r["recipe"], r["stage"], r["planned"] >> 20, r["measured"] >> 20,
                 f"{r['planned'] / max(r['measured'], 1):.2f}"]
                for r in rows
            ],
        )
    )  # fmt: skip
    large = [row for row in rows if row["measured"] > SMALL]
    checks = [
        check(f"{r['recipe']}: {r['stage']}", abs(r["planned"] / r["measured"] - 1), at_most=WITHIN)
        for r in large
    ]
    print(checks_table(checks))
    write_result(options.json, {"environment": here, "size": options.size, "rows": rows, "checks": checks})


if __name__ == "__main__":
    main()
