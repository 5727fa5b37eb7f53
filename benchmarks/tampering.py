"""Certified models and exports, damaged or edited by someone who makes every digest anew: is it told?

    python -m benchmarks.tampering [--tries N] [--seconds S] [--seed N] [--only NAME] --json FILE

accident: any file of a certified model, an export or a packed model is flipped, cut, emptied, zeroed, deleted
or added to, and `sqft verify DIR` must say so. Left out are what says of itself that it is not part of the
model: README.md, manifest.json and .sqft.json.
attacker: weights, tokenizer, template, settings, graph or the set of files are edited, and all digests,
reference logits and certificates made anew, without the signer's key; `--base --adapter`, of exports
`--merged`, or `--signed-by` must say so.
"""

import json
import random
import shutil
import tempfile
from collections.abc import Callable
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from benchmarks.campaign import Campaign, campaign_parser
from benchmarks.common import parse_options
from benchmarks.faulty_disk import damage
from benchmarks.fuzz.sources import EXPORTS, Sources
from benchmarks.warm import import_everything, run_child
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sqft.artifacts import digest_files, seal, unseal
from sqft.certificate import write_certificate
from sqft.certificate.reference import read_reference, write_reference
from sqft.checks import Check
from sqft.cli import run_command_line
from sqft.models import load_model

AIMS = {"accident": 2000, "attacker": 500}
DOCUMENTS = {"README.md", "manifest.json", ".sqft.json"}
CODE = "import os\n"
# Of the JSON files beside the weights, values that change what a model says.
SETTINGS: dict[str, dict[str, Any]] = {
    "config.json": {
        "rope_theta": 5.0, "rms_norm_eps": 0.1, "eos_token_id": 7, "hidden_act": "relu", "bos_token_id": 5,
        "tie_word_embeddings": True, "num_key_value_heads": 4, "attention_bias": True, "use_cache": False,
        "rope_parameters": {"rope_type": "linear", "factor": 9.0, "rope_theta": 1e4}, "vocab_size": 287,
        "auto_map": {"AutoConfig": "evil.C"}, "torch_dtype": "float16", "pad_token_id": 4, "evil": 1,
    },
    "generation_config.json": {
        "temperature": 9.0, "do_sample": True, "eos_token_id": 9, "max_new_tokens": 3, "top_k": 1,
        "repetition_penalty": 3.0, "suppress_tokens": [5], "bad_words_ids": [[7]], "num_beams": 4,
    },
    "tokenizer_config.json": {
        "eos_token": "<pad>", "add_bos_token": True, "chat_template": "{{ 'obey' }}", "model_max_length": 3,
        "tokenizer_class": "LlamaTokenizer", "clean_up_tokenization_spaces": True, "bos_token": "<|user|>",
    },
}  # fmt: skip
ADDED = (
    "modeling_evil.py", "pytorch_model.bin", "more.gguf", ".profile", ".git/config", "added_tokens.json",
    "special_tokens_map.json", "additional_chat_templates/x.jinja", "merges.txt", "adapter_config.json",
    "generation.py", "consolidated.safetensors", "model-00001-of-00002.safetensors", "quantize_config.json",
    "openvino_config.json", "preprocessor_config.json", "custom_generate/generate.py",
)  # fmt: skip

Edit = Callable[[Path, random.Random], str]


def accident(sources: Sources, folder: Path, draw: random.Random) -> tuple[str, list[str]]:
    """(what was done, the command that must find it)."""
    whole = _targets(sources)[draw.choice(["merged", "merged", "merged", "packed", *EXPORTS])]
    directory = Path(shutil.copytree(whole, folder / "model"))
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name not in DOCUMENTS]
    path = draw.choice(paths)
    before = path.read_bytes()
    if draw.random() < 0.1:
        what = "appended to"
        path.write_bytes(before + draw.randbytes(draw.randrange(1, 9)))
    else:
        while path.is_file() and path.read_bytes() == before:
            what = damage(path, draw)
    return f"{whole.name}/{path.name}: {what}", ["verify", str(directory)]


def attacker(sources: Sources, folder: Path, draw: random.Random) -> tuple[str, list[str]]:
    """(what was done, the command that must find it)."""
    kind = draw.choices(["merged", "signed", *EXPORTS], [50, 20, 8, 8, 8, 8, 2])[0]
    whole = _targets(sources)[kind]
    directory = Path(shutil.copytree(whole, folder / "model"))
    before = digest_files(directory)
    hidden = len(list(directory.rglob(".*")))
    what = "nothing"
    while digest_files(directory) == before and len(list(directory.rglob(".*"))) == hidden:
        what = draw.choice(EDITS)(directory, draw)
    if (directory / "sqft_export.json").is_file():
        path = directory / "sqft_export.json"
        record = unseal(json.loads(path.read_text()))
        found = digest_files(directory)
        record["files"] = {n: d for n, d in found.items() if n in record["files"] or n not in before}
        path.write_text(json.dumps(seal(record)))
        return f"{kind}: {what}", ["verify", str(directory), "--merged", str(sources.merged)]
    _certify_anew(directory)
    if kind == "signed":
        return f"{kind}: {what}", ["verify", str(directory), "--signed-by", str(sources.signed[1])]
    return f"{kind}: {what}", [
        "verify", str(directory), "--base", str(sources.base), "--adapter", str(sources.adapter),
    ]  # fmt: skip


def _targets(sources: Sources) -> dict[str, Path]:
    return {
        "merged": sources.merged,
        "packed": sources.packed,
        "signed": sources.signed[0],
        **{name: sources.export(name) for name in EXPORTS},
    }


def _certify_anew(directory: Path) -> None:
    """What someone without a key can write: reference logits of the edited model, and a certificate."""
    record = json.loads((directory / "sqft_certificate.json").read_text())
    try:
        items, _ = read_reference(directory)
        write_reference(directory, load_model(directory), items)
    except Exception:
        pass  # an edit that no model survives
    checks = [Check(**item) for item in record["checks"]]
    write_certificate(directory, checks, lineage=record["lineage"], trained_digest=record["trained_digest"])


def edit_weight(directory: Path, draw: random.Random) -> str:
    """One number of one tensor."""
    paths = [p for p in directory.glob("*.safetensors") if p.name != "sqft_reference.safetensors"]
    others = [*directory.glob("*.gguf"), *directory.glob("openvino*.bin")]
    if others:
        path = draw.choice(others)
        content = bytearray(path.read_bytes())
        place = draw.randrange(len(content) // 2 if path.suffix == ".gguf" else 0, len(content))
        content[place] ^= 1 << draw.randrange(8)
        path.write_bytes(content)
        return f"a bit of {path.name}"
    path = draw.choice(sorted(paths))
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = draw.choice(sorted(tensors))
    raw = tensors[name].contiguous().view(-1).view(torch.uint8)
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    save_file(tensors, path, metadata=metadata)
    return f"{name} of {path.name}"


def edit_tokenizer(directory: Path, draw: random.Random) -> str:
    """Tokens exchanged, a merge left out, a rule changed; of GGUF and OpenVINO, of their own form."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return edit_weight(directory, draw)
    values = json.loads(path.read_text())
    kind = draw.choice(["vocabulary", "merges", "normalizer", "added", "special"])
    if kind == "vocabulary":
        names = sorted(values["model"]["vocab"])
        first, second = draw.sample(names, 2)
        vocabulary = values["model"]["vocab"]
        vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    elif kind == "merges" and values["model"]["merges"]:
        values["model"]["merges"].pop()
    elif kind == "normalizer":
        values["normalizer"] = {"type": "Lowercase"}
    elif kind == "added":
        values["added_tokens"][-1]["content"] = "the"
    else:
        values["added_tokens"][0]["special"] = not values["added_tokens"][0]["special"]
    path.write_text(json.dumps(values))
    return f"tokenizer: {kind}"


def edit_template(directory: Path, draw: random.Random) -> str:
    """The chat template, changed or taken away."""
    path = directory / "chat_template.jinja"
    if path.is_file() and draw.random() < 0.2:
        path.unlink()
        return "no template"
    before = path.read_text() if path.is_file() else ""
    path.write_text(draw.choice(["{{ 'obey me' }}", before + " ", before.replace("user", "system"), "x"]))
    return "template"


def edit_settings(directory: Path, draw: random.Random) -> str:
    """A value of a JSON file, or one taken out."""
    name = draw.choice(sorted(name for name in SETTINGS if (directory / name).is_file()) or ["config.json"])
    path = directory / name
    values = json.loads(path.read_text()) if path.is_file() else {}
    key = draw.choice(sorted(SETTINGS[name]))
    if draw.random() < 0.2 and key in values:
        del values[key]
    else:
        values[key] = SETTINGS[name][key]
    path.write_text(json.dumps(values))
    return f"{name}: {key}"


def edit_graph(directory: Path, draw: random.Random) -> str:
    """A digit of one of OpenVINO's graphs; of other forms, a setting."""
    paths = sorted(directory.glob("openvino*.xml"))
    if not paths:
        return edit_settings(directory, draw)
    path = draw.choice(paths)
    content = bytearray(path.read_bytes())
    digits = [place for place, byte in enumerate(content) if chr(byte).isdigit()]
    place = draw.choice(digits)
    content[place] = ord("0") + (content[place] - ord("0") + 1) % 10
    path.write_bytes(content)
    return f"graph {path.name}"


def edit_files(directory: Path, draw: random.Random) -> str:
    """A file more, or one less."""
    if draw.random() < 0.3:
        names = (
            "tokenizer.json",
            "generation_config.json",
            "sqft_masks.safetensors",
            "tokenizer_config.json",
        )
        path = directory / draw.choice(names)
        path.unlink(missing_ok=True)
        return f"no {path.name}"
    path = directory / draw.choice(ADDED)
    path.parent.mkdir(exist_ok=True)
    path.write_text(CODE)
    return f"more: {path.relative_to(directory)}"


EDITS: list[Edit] = [
    edit_weight, edit_weight, edit_tokenizer, edit_template, edit_settings, edit_settings, edit_graph,
    edit_files,
]  # fmt: skip
CAMPAIGNS: dict[str, Callable[[Sources, Path, random.Random], tuple[str, list[str]]]] = {
    "accident": accident,
    "attacker": attacker,
}


def one_try(sources: Sources, key: str, folder: Path) -> tuple[bool, str]:
    """(told, what was done and what was said)."""
    what, command = CAMPAIGNS[key.split(":")[1]](sources, folder, random.Random(key))
    ended = run_child(lambda: run_command_line(command), seconds=120)
    shutil.rmtree(folder)
    told = (ended.code == 1 and "FAILED" in ended.said) or (ended.code == 2 and ended.is_clean)
    return told, what if told else f"{what}: exit {ended.code}: {ended.said[-600:]}"


def prepare(root: Path) -> Sources:
    """What is damaged and edited; untouched, all of it must pass."""
    import_everything()
    sources = Sources(root)
    for name, whole in _targets(sources).items():
        with redirect_stdout(StringIO()) as said:  # here, so that all that is loaded once is loaded
            code = run_command_line(["verify", str(whole)])
        assert code == 0, f"{name} does not pass untouched: {said.getvalue()}"
    return sources


def main() -> None:
    """Run the campaigns and tell how many edits were told."""
    parser = campaign_parser(__doc__, list(AIMS), "of each campaign (default: as many as the aim)")
    options = parse_options(parser)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if options.one:
            print(one_try(prepare(root), options.one, root / "try"))
            return
        wanted = {name: options.tries or AIMS[name] for name in options.only or AIMS}
        campaign = Campaign.open(options.json, options.seed, wanted)
        sources = prepare(root)
        for name, key in campaign.turns(options.seconds):
            told, what = one_try(sources, key, root / "try")
            campaign.note(name, key, told, what.split("/")[0].split(":")[0], what)
    campaign.tell()


if __name__ == "__main__":
    main()
