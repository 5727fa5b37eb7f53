"""Files that plant code or a fetch, read without trust_remote_code: does any run, or reach for the net?

    python -m benchmarks.payloads [--kind NAME] [--json FILE]

Each payload is put into a whole file, and a command reads it in a child that notes, by Python's audit events,
every process that is started, every connection and every name that is looked up; the planted code itself
leaves a file. Good is: none of these, and a right end or one line. Processes that the same command starts
without a payload are not counted: lm-evaluation-harness asks git and pip for versions.
"""

import io
import json
import os
import pickle
import platform
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml
from benchmarks.common import check, checks_table, environment, make_parser, parse_options, write_result
from benchmarks.fuzz.sources import Sources
from benchmarks.warm import import_everything, run_child

from sqft.cli import run_command_line

NOTED = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")
TALK = [
    {"messages": [{"role": "user", "content": f"{a}?"}, {"role": "assistant", "content": f"{a + 1}."}]}
    for a in range(8)
]
ITEMS = [{"question": f"what is {a}?", "answer": str(a)} for a in range(12)]
Case = tuple[str, Callable[["Place"], list[str]]]


class Place:
    """A folder of its own for one payload: a model, a LoRA, data and recipes, and the canary."""

    def __init__(self, sources: Sources, folder: Path) -> None:
        self.sources, self.folder, self.canary = sources, folder, folder / "ran"
        folder.mkdir()
        self.model = Path(shutil.copytree(sources.model, folder / "model"))
        self.code = f"import pathlib; pathlib.Path({str(self.canary)!r}).write_text('ran')\n"
        (folder / "talk.jsonl").write_text("\n".join(map(json.dumps, TALK)))
        (folder / "items.jsonl").write_text("\n".join(map(json.dumps, ITEMS)))

    def write(self, name: str, content: str | bytes) -> Path:
        """A file below the folder."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def edit(self, name: str, **values: Any) -> None:
        """Change values of one of the model's JSON files."""
        path = self.model / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def run(self, *, chat: bool = False, **sections: Any) -> list[str]:
        """A run of a recipe with this model."""
        data = {"train": str(self.folder / ("talk.jsonl" if chat else "items.jsonl")), "sequence_length": 200}
        sections = {"model": str(self.model), "data": data} | sections
        return ["run", str(self.sources.write_recipe(self.folder, **sections))]

    def merge(self, lora: Path) -> list[str]:
        """The merge of an adapter."""
        output = str(self.folder / "out")
        return ["merge", "--base", str(self.model), "--adapter", str(lora), "--output", output]

    def lora(self) -> Path:
        """A copy of the whole adapter."""
        return Path(shutil.copytree(self.sources.lora, self.folder / "lora"))

    def pickled(self) -> bytes:
        """A pickle that leaves the canary where it is loaded."""
        return pickle.dumps(_Planted(self.code))

    def archive(self) -> bytes:
        """The same as torch.save writes it."""
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", self.pickled())
            archive.writestr("archive/version", "3\n")
        return file.getvalue()


class _Planted:
    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> Any:
        return exec, (self.code,)


def pickles() -> Iterator[Case]:
    """Pickles under every name that some library would load."""
    for form in ("pickled", "archive"):
        for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "tokenizer.model", "model.pt"):
            yield f"{form} {name} beside the weights", _beside(name, form, keep=True)
        for name in ("pytorch_model.bin", "model.safetensors", "model.safetensors.index.json", "config.json"):
            yield f"{form} {name} in place of the weights", _beside(name, form, keep=False)
        for name in ("adapter_model.bin", "adapter_model.safetensors", "adapter_config.json"):
            yield f"{form} {name} of an adapter", _in_adapter(name, form)
        for name in ("items.jsonl", "a.parquet", "a.json.gz", "a.csv"):
            yield f"{form} data {name}", _as_data(name, form)
        yield f"{form} as GGUF", _as_gguf(form)
        for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"):
            yield f"{form} {name} of a checkpoint", _in_checkpoint(name, form)


def _beside(name: str, form: str, *, keep: bool) -> Callable[[Place], list[str]]:
    def plant(place: Place) -> list[str]:
        if not keep:
            (place.model / "model.safetensors").unlink()
        (place.model / name).write_bytes(getattr(place, form)())
        return place.run()

    return plant


def _in_adapter(name: str, form: str) -> Callable[[Place], list[str]]:
    def plant(place: Place) -> list[str]:
        lora = place.lora()
        if name.endswith(".bin"):
            (lora / "adapter_model.safetensors").unlink()
        (lora / name).write_bytes(getattr(place, form)())
        return place.merge(lora)

    return plant


def _as_data(name: str, form: str) -> Callable[[Place], list[str]]:
    return lambda place: place.run(data={"train": str(place.write(name, getattr(place, form)()))})


def _as_gguf(form: str) -> Callable[[Place], list[str]]:
    return lambda place: place.run(model=str(place.write("model.gguf", getattr(place, form)())))


def _in_checkpoint(name: str, form: str) -> Callable[[Place], list[str]]:
    """A finished training is made unfinished, with a checkpoint that is not as it was written."""

    def plant(place: Place) -> list[str]:
        runs = Path(shutil.copytree(place.sources.workspace, place.folder / "runs"))
        stage = next((runs / "stages").glob("train-*"))
        partial = stage.rename(stage.with_name(stage.name + ".partial"))
        (partial / "manifest.json").unlink()
        for path in partial.rglob("checkpoint-*"):
            (path / name).write_bytes(getattr(place, form)())
        (partial / "checkpoint-1").mkdir(exist_ok=True)
        (partial / "checkpoint-1" / name).write_bytes(getattr(place, form)())
        values = place.sources.recipe | {"runtime": {"workspace": str(runs), "device": "cpu", "threads": 1}}
        return ["run", str(place.write("recipe.yaml", yaml.safe_dump(values)))]

    return plant


def configs() -> Iterator[Case]:
    """Config, tokenizer and generation settings that name code or a place on the hub."""
    remote = "evil/repo--modeling_evil.Evil"
    for name in ("modeling_evil.Evil", remote):
        for auto in ("AutoConfig", "AutoModelForCausalLM", "AutoModel", "AutoTokenizer"):
            yield f"auto_map {auto}: {name}", _model("config.json", auto_map={auto: name})
        yield (
            f"tokenizer's auto_map: {name}",
            _model("tokenizer_config.json", auto_map={"AutoTokenizer": [name, name]}),
        )
    kernel = "evil/attention-kernel"
    for key in ("_attn_implementation", "attn_implementation", "experts_implementation", "_name_or_path"):
        yield f"config {key}", _model("config.json", **{key: kernel})
    settings: tuple[tuple[str, Any], ...] = (
        ("base_model_name_or_path", "evil/base"),
        ("quantization_config", {"quant_method": "evil", "modules": "evil"}),
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("model_type", "evil"),
        ("hidden_act", "__import__('os').system"),
        ("architectures", ["Evil"]),
        ("use_kernels", True),
    )
    for key, value in settings:
        yield f"config {key}: {str(value)[:30]}", _model("config.json", **{key: value})
    for key, value in (
        ("tokenizer_class", "evil.Tokenizer"),
        ("tokenizer_class", "EvilTokenizerFast"),
        ("tokenizer_file", "https://evil.invalid/tokenizer.json"),
        ("name_or_path", "evil/tokenizer"),
        ("processor_class", "EvilProcessor"),
    ):
        yield f"tokenizer {key}: {value[:20]}", _model("tokenizer_config.json", **{key: value})
    settings = (
        ("custom_generate", "evil/generate"),
        ("cache_implementation", "evil"),
        ("assistant_model", "evil/assistant"),
        ("watermarking_config", {"evil": 1}),
    )
    for key, value in settings:
        yield f"generation {key}", _model("generation_config.json", **{key: value})
    for name in (
        "custom_generate/generate.py",
        "__init__.py",
        "configuration_evil.py",
        "setup.py",
        "conftest.py",
    ):
        yield f"a file {name}", _file(name)
    settings = (
        ("base_model_name_or_path", "evil/base"),
        ("auto_mapping", {"base_model_class": "Evil", "parent_library": "evil"}),
        ("revision", "evil"),
        ("megatron_config", {"evil": 1}),
        ("peft_type", "EVIL"),
        ("init_lora_weights", "evil"),
        ("eva_config", {"evil": 1}),
    )
    for key, value in settings:
        yield f"adapter {key}", _adapter(**{key: value})


def _model(name: str, **values: Any) -> Callable[[Place], list[str]]:
    def plant(place: Place) -> list[str]:
        (place.model / "modeling_evil.py").write_text(place.code)
        place.edit(name, **values)
        return place.run(chat=True)

    return plant


def _file(name: str) -> Callable[[Place], list[str]]:
    def plant(place: Place) -> list[str]:
        place.write(f"model/{name}", place.code)
        return place.run()

    return plant


def _adapter(**values: Any) -> Callable[[Place], list[str]]:
    def plant(place: Place) -> list[str]:
        path = place.lora() / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return place.merge(path.parent)

    return plant


def templates() -> Iterator[Case]:
    """Jinja that climbs to Python, as a chat template, in the tokenizer's settings, in GGUF, in a task."""
    system = "os.system('touch CANARY')"
    climbs = (
        "{{ cycler.__init__.__globals__." + system + " }}",
        "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
        "{{ ''.__class__.__mro__[1].__subclasses__()[0] }}{{ joiner.__init__.__globals__." + system + " }}",
        "{{ raise_exception.__globals__['__builtins__']['exec']('import os; " + system + "') }}",
        "{{ strftime_now.__globals__['datetime'].sys.modules['os']." + system[3:] + " }}",
        "{{ self.__init__.__globals__.__builtins__.__import__('os')." + system[3:] + " }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}{{ namespace.__init__.__globals__." + system + " }}",
        "{{ (messages|map('attr', '__class__'))|list }}{{ range.__self__.exec('import os') }}",
    )
    for number, text in enumerate(climbs):
        yield f"chat template {number}", _template(text, "chat_template.jinja")
        yield f"chat template {number} in the settings", _template(text, "tokenizer_config.json")
        yield f"doc_to_text {number} of a task", _task(doc_to_text=text)


def _template(text: str, name: str) -> Callable[[Place], list[str]]:
    def plant(place: Place) -> list[str]:
        planted = text.replace("CANARY", str(place.canary))
        if name.endswith(".json"):
            (place.model / "chat_template.jinja").unlink()
            place.edit(name, chat_template=planted)
        else:
            (place.model / name).write_text(planted)
        return place.run(chat=True)

    return plant


def tasks() -> Iterator[Case]:
    """Task files of lm-evaluation-harness that name code or data of elsewhere."""
    for key in (
        "doc_to_text",
        "doc_to_target",
        "process_docs",
        "process_results",
        "doc_to_choice",
        "custom_dataset",
    ):
        yield f"task {key}: !function", _task(tagged=f"{key}: !function evil.f")
    yield "task metric !function", _task(tagged="metric_list: [{metric: !function evil.f}]")
    yield "task class !function", _task(tagged="class: !function evil.f")
    yield "task !!python", _task(tagged="metadata: !!python/object/apply:os.system ['touch CANARY']")
    fields: tuple[tuple[str, Any], ...] = (
        ("dataset_path", "evil/data"),
        ("dataset_kwargs", {"data_files": "https://evil.invalid/a.json"}),
        ("dataset_kwargs", {"trust_remote_code": True}),
        ("metric_list", [{"metric": "evil/metric", "hf_evaluate": True}]),
        ("custom_dataset", "evil.f"),
        ("include", "other.yaml"),
        ("filter_list", [{"name": "a", "filter": [{"function": "custom", "filter_fn": "evil.f"}]}]),
        ("unsafe_code", True),
    )
    for key, value in fields:
        yield f"task {key}: {str(value)[:30]}", _task(**{key: value})
    yield "a folder with a loading script", _task(dataset_path="LOCAL")


def _task(tagged: str = "", **values: Any) -> Callable[[Place], list[str]]:
    """A task as a user may write it, with these fields."""

    def plant(place: Place) -> list[str]:
        place.write("evil.py", place.code + "f = print\n")
        place.write("other.yaml", "doc_to_text: !function evil.f\n")
        place.write("local/local.py", place.code)
        place.write("test.jsonl", "\n".join(map(json.dumps, ITEMS)))
        task = {
            "task": "evil", "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
            "dataset_kwargs": {"data_files": {"test": str(place.folder / "test.jsonl")}},
            "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
            "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 2},
        } | values  # fmt: skip
        if tagged:
            task.pop(tagged.split(":")[0], None)
        text = yaml.safe_dump(task) + tagged + "\n"
        text = text.replace("CANARY", str(place.canary)).replace("LOCAL", str(place.folder / "local"))
        path = place.write("task.yaml", text)
        return place.run(
            evaluate={"models": ["sparse"], "max_items": 2, "max_new_tokens": 2, "tasks": [str(path)]}
        )

    return plant


def recipes() -> Iterator[Case]:
    """Recipes with YAML tags, arguments that upload or load, and paths that are addresses."""
    for tag in (
        "!!python/object/apply:os.system ['touch CANARY']",
        "!!python/object/new:os.system ['touch CANARY']",
        "!!python/name:os.system",
        "!!python/module:evil",
        "!!python/object:evil.Evil {}",
        "!function evil.f",
    ):
        yield f"recipe {tag[:30]}", _text(f"model: MODEL\nname: {tag}\nsparsify: {{method: magnitude}}\n")
    arguments: tuple[tuple[str, Any], ...] = (
        ("push_to_hub", True),
        ("hub_model_id", "evil/model"),
        ("hub_token", "x"),
        ("deepspeed", "evil.json"),
        ("fsdp_config", "evil.json"),
        ("torch_compile_backend", "evil"),
        ("optim_args", "evil=1"),
        ("resume_from_checkpoint", "evil"),
        ("liger_kernel_config", {"evil": 1}),
        ("trackio_space_id", "evil/space"),
    )
    for key, value in arguments:
        yield f"train.arguments {key}", _arguments(**{key: value})
    for path in ("https://evil.invalid/a.jsonl", "s3://evil/a.jsonl", "file:///a.jsonl", "| touch CANARY"):
        yield f"data {path[:12]}", _sections(data={"train": path})
        yield f"perplexity {path[:12]}", _sections(evaluate={"models": ["sparse"], "perplexity": path})
    for source in (
        "https://evil.invalid/model",
        "https://evil.invalid/m.gguf",
        "package:evil",
        "git+https://e.invalid/x",
    ):
        yield f"model {source[:24]}", _sections(model=source)
    for prompt in ("{question.__class__}", "{question.__init__.__globals__}", "{0}", "{question!x}"):
        yield (
            f"prompt {prompt}",
            _sections(data={"train": "items.jsonl", "prompt": prompt, "answer": "{answer}"}),
        )


def _text(text: str) -> Callable[[Place], list[str]]:
    def plant(place: Place) -> list[str]:
        place.write("evil.py", place.code)
        planted = text.replace("MODEL", str(place.model)).replace("CANARY", str(place.canary))
        return ["run", str(place.write("recipe.yaml", planted))]

    return plant


def _arguments(**values: Any) -> Callable[[Place], list[str]]:
    train = {"max_steps": 1, "batch_size": 2, "arguments": values}
    return _sections(adapters={"method": "sparse_peft", "ranks": [4]}, train=train)


def _sections(**sections: Any) -> Callable[[Place], list[str]]:
    def plant(place: Place) -> list[str]:
        place.write("evil/__init__.py", place.code)
        if "data" in sections and sections["data"]["train"] == "items.jsonl":
            sections["data"]["train"] = str(place.folder / "items.jsonl")
        return place.run(**sections)

    return plant


def one_case(
    sources: Sources, folder: Path, plant: Callable[[Place], list[str]], usual: set[str]
) -> tuple[bool, str, set[str]]:
    """(nothing ran and it ended well, what happened, what was noted). usual: noted without a payload."""
    place = Place(sources, folder)
    command, notes = plant(place), folder / "noted"

    def work() -> int:
        os.chdir(folder)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in NOTED:
                with notes.open("a") as file:
                    file.write(f"{event} {arguments!r}"[:300] + "\n")

        sys.addaudithook(hook)
        return run_command_line(command)

    ended = run_child(work, seconds=120)
    noted = set(notes.read_text().splitlines()) if notes.exists() else set()
    ran = place.canary.exists() or bool(noted - usual)
    happened = f"{'RAN ' if ran else ''}{sorted(noted - usual)} exit {ended.code} {ended.said[-400:]}"
    shutil.rmtree(folder)
    return not ran and ended.is_clean, happened, noted


CASES = (pickles, configs, templates, tasks, recipes)


def main() -> None:
    """Plant everything, and tell what ran."""
    parser = make_parser(__doc__)
    kinds = {kind.__name__: kind for kind in CASES}
    parser.add_argument("--kind", choices=list(kinds), action="append", help="only this one")
    options = parse_options(parser)
    here = environment()
    import_everything()
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as root:
        sources = Sources(Path(root))
        platform.processor()  # asks `uname`, once a process
        _, happened, usual = one_case(sources, Path(root) / "case", _task(), set())
        assert not any("socket" in line for line in usual), happened
        for kind in (kinds[name] for name in options.kind or kinds):
            found: dict[str, Any] = {"payloads": 0, "good": 0, "bad": []}
            for name, plant in kind():
                good, happened, _ = one_case(sources, Path(root) / "case", plant, usual)
                found["payloads"] += 1
                found["good"] += good
                if not good:
                    found["bad"].append({"payload": name, "happened": happened})
                    print(f"BAD {name}: {happened}", flush=True)
            results[kind.__name__] = found
    checks = [
        check(f"{name}: nothing ran, of {r['payloads']}", r["good"], at_least=r["payloads"])
        for name, r in results.items()
    ]
    print(checks_table(checks))
    write_result(options.json, {"environment": here, "results": results, "checks": checks})


if __name__ == "__main__":
    main()
