"""The kinds of files that are edited: what each try runs, and what must hold where it is accepted."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from benchmarks.fuzz import judges
from benchmarks.fuzz.edits import Editor
from benchmarks.fuzz.sources import Sources
from safetensors import safe_open

from sqft.artifacts import digest_file, digest_files, seal

__all__ = ["KINDS", "Try"]

Judge = Callable[[], str | None]
PROMPT = {"prompt": "question: {question} answer: ", "sequence_length": 64}
# What makes a run long or large, if it is asked for: no edit raises it.
WORK = {
    "epochs", "max_steps", "num_trials", "refit", "descent", "num_samples", "sequence_length", "batch_size",
    "max_new_tokens", "polish_steps", "neighbours",
}  # fmt: skip

TEMPLATES = (
    "{% for m in messages %}", "{% endfor %}", "{{ messages }}", "{{ messages[0].role }}", "{% if %}",
    "{{ 1/0 }}", "{{ m.content|length }}", "{{ ''.__class__.__mro__ }}", "{% set x = 'a' * 10**9 %}",
    "</s>", "{{ m.content }}", "{% for a in range(10**9) %}{% endfor %}", "{{ raise_exception('x') }}",
    "{% generation %}", "{% include 'x' %}", "{{ messages|tojson }}", "{{ cycler.__init__.__globals__ }}",
    "{{ lipsum(n=10**6) }}", "{{ range(10**9)|list }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ 'a'|center(10**10) }}", "{% if add_generation_prompt %}",
)  # fmt: skip


@dataclass(frozen=True)
class Try:
    """A command line, the file that was edited, what else may be its exit code, and the judge of exit 0."""

    arguments: list[str]
    edited: Path
    judge: Judge
    codes: tuple[int, ...] = ()


def recipes(sources: Sources, folder: Path, edit: Editor) -> Try:
    """A recipe, edited as values or as text, is planned."""
    values = dict(sources.recipe, runtime={"workspace": str(folder / "runs"), "device": "cpu"})
    changed = edit.yaml_text(values)
    path = folder / "recipe.yaml"
    path.write_bytes(changed)

    def judge() -> str | None:
        found = yaml.safe_load(changed.decode())
        return None if isinstance(found, dict) and found.get("model") else "it is not a mapping with a model"

    return Try(["plan", str(path)], path, judge)


def settings(sources: Sources, folder: Path, edit: Editor) -> Try:
    """Numbers and choices of a recipe are drawn from far outside of what is usual, and it runs.

    What only makes it long, a number of steps or samples, is drawn small.
    """
    values = json.loads(json.dumps(sources.recipe)) | {
        "runtime": {"workspace": str(folder / "runs"), "device": "cpu", "threads": 1}
    }
    for section in ("calibration", "train", "search", "evaluate"):
        values.setdefault(section, {})
    values["calibration"] |= {"num_samples": 4, "sequence_length": 16}
    values["train"] |= {"max_steps": 1, "batch_size": 2}
    values["search"] |= {"num_trials": 2}
    values["evaluate"] |= {"max_items": 2, "max_new_tokens": 2, "batch_size": 2, "models": ["merged"]}
    more: dict[str, tuple[str, ...]] = {
        "sparsify": ("sparsity", "pattern", "target_modules", "skip_modules"),
        "quantize": ("bits", "group_size", "symmetric", "scale_bits", "damping", "skip_modules"),
        "adapters": ("ranks", "alpha", "dropout", "gradient", "target_modules", "rank_groups"),
        "train": ("learning_rate", "warmup_steps", "schedule", "arguments", "gradient_checkpointing", "seed"),
        "data": ("sequence_length", "train_items", "test_items", "search_items", "answer", "prompt"),
        "calibration": ("num_samples", "sequence_length", "source"),
        "evaluate": ("batch_size", "max_new_tokens", "perplexity", "max_items", "sequence_length"),
    }  # fmt: skip
    draw = edit.draw
    for _ in range(draw.choice((1, 1, 2)) if edit.works else 0):
        section = draw.choice(list(more))
        key = draw.choice(more[section])
        small: tuple[Any, ...] = (
            0,
            -1,
            1,
            3,
            0.0,
            1e-30,
            1.0,
            0.999999,
            True,
            None,
            "2:4",
            "16:4",
            "all",
            [],
            [1],
            ["x"],
            [64],
        )
        large: tuple[Any, ...] = (
            2**31,
            2**63,
            10**12,
            1e30,
            1e308,
            float("inf"),
            float("nan"),
            5000,
            [10**9],
            {"max_grad_norm": 0},
        )
        values[section][key] = draw.choice(small if key in WORK else small + large)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return Try(["run", str(path)], path, lambda: judges.judge_model(folder / "runs" / "tiny" / "merged"))


def data(sources: Sources, folder: Path, edit: Editor) -> Try:
    """JSON lines, edited as values or as bytes, are read by a run."""
    lines = Path(sources.recipe["data"]["train"]).read_text().splitlines()[:12]
    if edit.draw.random() < 0.6:
        place = edit.draw.randrange(len(lines))
        lines[place] = json.dumps(edit.tree(json.loads(lines[place])))
        content = "\n".join(lines).encode()
    else:
        content = edit.raw("\n".join(lines).encode())
    path = folder / "train.jsonl"
    path.write_bytes(content)
    recipe = sources.write_recipe(folder, data={"train": str(path), **PROMPT})

    def judge() -> str | None:
        (stage,) = (folder / "runs" / "stages").glob("items-*")
        return judges.judge_items(path, stage)

    return Try(["run", str(recipe)], path, judge)


def tables(sources: Sources, folder: Path, edit: Editor) -> Try:
    """JSON, CSV, TSV, text and Parquet files, edited as bytes, are shown."""
    rows = [json.loads(line) for line in Path(sources.recipe["data"]["train"]).read_text().splitlines()[:12]]
    suffix = edit.draw.choice((".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"))
    path = folder / f"train{suffix}"
    path.write_bytes(edit.raw(_as_file(rows, suffix)))
    form = {} if suffix == ".txt" else PROMPT
    recipe = sources.write_recipe(folder, data={"train": str(path), **form})
    return Try(["preview", str(recipe)], path, lambda: None)


def _as_file(rows: list[dict[str, Any]], suffix: str) -> bytes:
    import gzip
    import io

    if suffix == ".json":
        return json.dumps(rows).encode()
    if suffix == ".jsonl.gz":
        return gzip.compress("\n".join(map(json.dumps, rows)).encode(), mtime=0)
    if suffix == ".txt":
        return b"the quick brown fox jumps over the lazy dog. " * 40
    if suffix == ".parquet":
        from sqft.errors import require

        file = io.BytesIO()
        table = require("pyarrow", "hub").Table.from_pylist(rows)
        require("pyarrow.parquet", "hub").write_table(table, file)
        return file.getvalue()
    between = "," if suffix == ".csv" else "\t"
    lines = [between.join(f'"{value}"' for value in row.values()) for row in rows]
    return "\n".join([between.join(rows[0]), *lines]).encode()


def safetensors(sources: Sources, folder: Path, edit: Editor) -> Try:
    """The weights of a model, edited in header and data, are compressed."""
    model = _copy(sources.model, folder / "model")
    path = model / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    path.write_bytes(edit.safetensors(path.read_bytes()))
    if edit.draw.random() < 0.6:
        return Try(["inspect", str(model)], path, lambda: judges.judge_source(path, shapes, finite=False))
    recipe = sources.write_recipe(folder, model=str(model))
    judge: Judge = lambda: judges.judge_source(path, shapes) or judges.judge_model(_made(folder))  # noqa: E731
    return Try(["run", str(recipe)], path, judge)


def configs(sources: Sources, folder: Path, edit: Editor) -> Try:
    """The config of a model, or its generation settings, edited as values or as bytes."""
    model = _copy(sources.model, folder / "model")
    path = model / edit.draw.choice(("config.json",) * 4 + ("generation_config.json",))
    edit.json_file(path)
    if edit.draw.random() < 0.5:
        return Try(["inspect", str(model)], path, lambda: judges.judge_model(model))
    recipe = sources.write_recipe(folder, model=str(model))
    return Try(["run", str(recipe)], path, lambda: judges.judge_model(_made(folder)))


def tokenizers(sources: Sources, folder: Path, edit: Editor) -> Try:
    """A tokenizer, its settings and its chat template, edited; conversations are read with them."""
    model = _copy(sources.model, folder / "model")
    names = ("tokenizer.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    path = model / edit.draw.choice(names)
    draw = edit.draw
    if path.suffix == ".json":
        edit.json_file(path)
    elif draw.random() < 0.5 or not edit.works:
        path.write_bytes(edit.raw(path.read_bytes()))
    else:
        path.write_text("".join(draw.choice(TEMPLATES) for _ in range(draw.randrange(1, 6))))
    talk = [
        {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": f"{a + 1}."}]}
        for a in range(8)
    ]
    (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, talk)))
    recipe = sources.write_recipe(
        folder, model=str(model), data={"train": str(folder / "talk.jsonl"), "sequence_length": 400}
    )
    return Try(["run", str(recipe)], path, lambda: judges.judge_model(_made(folder)))


def gguf(sources: Sources, folder: Path, edit: Editor) -> Try:
    """A GGUF file, edited mostly in its header, is converted and compressed."""
    whole = (sources.export("gguf") / "model.gguf").read_bytes()
    header = whole.index(b"output_norm.weight") + 4000
    edge = edit.draw.choice((64, 1000, header, len(whole)))
    path = folder / "model.gguf"
    path.write_bytes(edit.raw(whole[:edge]) + whole[edge:])
    recipe = sources.write_recipe(folder, model=str(path), sparsify={"method": "magnitude", "sparsity": 0.7})

    def judge() -> str | None:
        (converted,) = (path for path in (folder / "runs" / "models").iterdir() if path.is_dir())
        return judges.judge_weights_of_gguf(converted, path) or judges.judge_model(_made(folder))

    return Try(["run", str(recipe)], path, judge)


def adapters(sources: Sources, folder: Path, edit: Editor) -> Try:
    """A LoRA adapter of others, edited in settings and factors, is merged."""
    adapter = _copy(sources.lora, folder / "lora")
    path = adapter / edit.draw.choice(("adapter_config.json", "adapter_model.safetensors"))
    if path.suffix == ".json":
        edit.json_file(path)
    else:
        path.write_bytes(edit.safetensors(path.read_bytes()))
    command = [
        "merge",
        "--base",
        str(sources.model),
        "--adapter",
        str(adapter),
        "--output",
        str(folder / "out"),
    ]
    return Try(command, path, lambda: judges.judge_lora(folder / "out", sources.model, adapter))


def packed(sources: Sources, folder: Path, edit: Editor) -> Try:
    """A packed model, edited in any file, is unpacked: every bit comes back, or nothing.

    Mostly the record is hashed anew, so that the edit is read; then a file that is stored as it is comes
    back as it is.
    """
    directory = _copy(sources.packed, folder / "packed")
    path = _edit_any(directory, edit)
    digests = dict(sources.digest(sources.merged))
    anew = edit.works and edit.draw.random() < 0.7 and _hash_anew(directory)
    if anew and path.name in digests and path.name != "config.json":
        digests[path.name] = digest_file(path)
    command = ["unpack", str(directory), "--output", str(folder / "out")]
    return Try(command, path, lambda: judges.judge_same(folder / "out", digests))


def certificates(sources: Sources, folder: Path, edit: Editor) -> Try:
    """A certified model, edited in one of its JSON files, is verified against base and adapter."""
    directory = _copy(sources.merged, folder / "merged")
    path = edit.draw.choice(sorted(directory.glob("*.json")))
    before = path.read_bytes()
    edit.json_file(path)
    command = ["verify", str(directory)]
    if edit.draw.random() < 0.3:
        command += ["--base", str(sources.base), "--adapter", str(sources.adapter)]

    def judge() -> str | None:
        same = path.name in ("manifest.json", ".sqft.json") or _equal_json(before, path.read_bytes())
        return None if same else f"{path.name} says something else, and it passed"

    return Try(command, path, judge, codes=(1,))


def workspaces(sources: Sources, folder: Path, edit: Editor) -> Try:
    """A small file of a workspace is edited, and the recipe runs again, or is planned, or told of."""
    workspace = _copy(sources.workspace, folder / "runs")
    paths = [p for p in workspace.rglob("*") if p.is_file() and p.suffix != ".safetensors"]
    path = edit.draw.choice(sorted(p for p in paths if p.stat().st_size))
    if path.suffix == ".json":
        edit.json_file(path)
    else:
        path.write_bytes(edit.raw(path.read_bytes()))
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        yaml.safe_dump(sources.recipe | {"runtime": {"workspace": str(workspace), "device": "cpu"}})
    )
    weights = {n: d for n, d in sources.digest(sources.merged).items() if n.endswith(".safetensors")}

    def judge() -> str | None:
        found = workspace / "tiny" / "merged"
        places = [found, *found.parent.glob("merged-*"), *workspace.glob("tiny-*/merged")]
        problems = [judges.judge_same(place, sources.digest(sources.merged)) for place in places]
        return None if weights and None in problems else f"no merged model is as it was: {problems}"

    command = edit.draw.choice(
        (["run", str(recipe)], ["run", str(recipe)], ["plan", str(recipe)], ["status", str(workspace)])
    )
    return Try(command, path, judge if command[0] == "run" else lambda: None)


KINDS: dict[str, Callable[[Sources, Path, Editor], Try]] = {
    "recipes": recipes,
    "settings": settings,
    "data": data,
    "tables": tables,
    "safetensors": safetensors,
    "configs": configs,
    "tokenizers": tokenizers,
    "gguf": gguf,
    "adapters": adapters,
    "packed": packed,
    "certificates": certificates,
    "workspaces": workspaces,
}


def _copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def _made(folder: Path) -> Path:
    return folder / "runs" / "tiny" / "model"


def _edit_any(directory: Path, edit: Editor) -> Path:
    path = edit.draw.choice(sorted(p for p in directory.rglob("*") if p.is_file()))
    if path.suffix == ".json":
        edit.json_file(path)
    elif path.suffix == ".safetensors":
        path.write_bytes(edit.safetensors(path.read_bytes()))
    else:
        path.write_bytes(edit.raw(path.read_bytes()))
    return path


def _hash_anew(packed: Path) -> bool:
    """Let the record of a packed model agree with what it says and with the files, so that these are read."""
    path = packed / "sqft_packed.json"
    try:
        record = json.loads(path.read_bytes())
        record.pop("sha256")
        if isinstance(record["files"], dict):
            record["files"] = {
                name: digest for name, digest in digest_files(packed).items() if name != path.name
            }
        path.write_text(json.dumps(seal(record)))
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # the edit is in the record, and remains
    return True


def _equal_json(first: bytes, second: bytes) -> bool:
    try:
        return bool(json.loads(first) == json.loads(second))
    except (ValueError, RecursionError):
        return False
