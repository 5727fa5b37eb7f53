"""Files other than the weights that change a model's answers, compared with those of its base.

settings     config, generation settings, tokenizer, chat template and code are the base's, byte by byte; of
             the config, entries that only say who wrote it may differ, and are named
strangers    there is no file that a merge does not write, hidden ones included
"""

import json
from pathlib import Path
from typing import Any

from sqft.artifacts import CERTIFICATE, FACTS, LAYERS, MANIFEST, MASKS, REFERENCE, digest_file
from sqft.certificate.stored import StoredModel, read_json
from sqft.errors import CertificateError
from sqft.marks import EVALUATIONS, MARK, list_names

__all__ = ["SIGNATURE", "check_files", "check_settings", "hidden_names"]

SIGNATURE = "sqft_certificate.json.sig"
TEXTS = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json",
    "vocab.txt",
)  # fmt: skip
OURS = {
    "config.json", "model.safetensors.index.json", FACTS, LAYERS, MASKS,
    CERTIFICATE, REFERENCE, SIGNATURE, "README.md", MANIFEST, MARK,
    ".environment.json",
}  # fmt: skip
OF_NO_EFFECT = {"_name_or_path", "transformers_version"}
GRID = "quantization_config"
SHOWN = 3


def check_settings(directory: Path, base_dir: Path) -> str:
    """Compare config, generation settings, tokenizer, template and code of a merge with its base's.

    Raises: CertificateError naming the first differences.
    """
    config, expected = read_json(directory / "config.json"), read_json(base_dir / "config.json")
    missing = object()
    keys = sorted(config.keys() | expected.keys())
    different = [key for key in keys if config.get(key, missing) != expected.get(key, missing)]
    allowed = OF_NO_EFFECT | ({GRID} if _scheme(config) == _scheme(expected) else set())
    problems = [
        f"config.json: {key} is {_shown(config, key)}, the base's {_shown(expected, key)}"
        for key in different
        if key not in allowed
    ]
    code = {path.name for place in (directory, base_dir) for path in place.glob("*.py")}
    same = 0
    for name in (*TEXTS, *sorted(code)):
        ours, theirs = directory / name, base_dir / name
        if ours.is_file() and theirs.is_file():
            same += 1
            if digest_file(ours) != digest_file(theirs):
                problems.append(f"{name} is not the base's")
        elif ours.is_file() or (theirs.is_file() and name not in code):  # code is copied where it is trusted
            problems.append(f"{name} is in only one of the merged model and the base")
    problems += _other_facts(directory, base_dir)
    if problems:
        more = f" and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        raise CertificateError("; ".join(problems[:SHOWN]) + more)
    named = f" but for {', '.join(different)}" if different else ""
    return f"config{named} and {same} files of generation settings, tokenizer and template are the base's"


def check_files(directory: Path) -> str:
    """Refuse files in a merged model that a merge does not write.

    Raises: CertificateError naming them.
    """
    weights = {path.name for path in StoredModel(directory).weight_files}
    code = {path.name for path in directory.glob("*.py")}  # compared with the base's by `check_settings`
    found = {name for name in list_names(directory) if not _is_evaluation(name)}
    strange = sorted(found - OURS - set(TEXTS) - weights - code)
    if strange:
        raise CertificateError(f"no part of a merged model: {', '.join(strange[:SHOWN])}")
    return f"{len(found)} files, none that a merge does not write"


def hidden_names(directory: Path) -> list[str]:
    """Hidden files of a directory, and those in hidden folders, other than the mark of our own."""
    names = list_names(directory) - {MARK, ".environment.json"}
    return sorted(
        name
        for name in names
        if any(part.startswith(".") for part in Path(name).parts) and not _is_evaluation(name)
    )


def _is_evaluation(name: str) -> bool:
    """Whether a file holds a measured figure in the hub's form; nothing reads these when the model runs."""
    path = Path(name)
    plain = path.suffix in (".json", ".jsonl", ".yaml") and not path.name.startswith(".")
    return path.parent.as_posix() == EVALUATIONS and (plain or path.name == MARK)


def _other_facts(directory: Path, base_dir: Path) -> list[str]:
    """Where sqft.json contradicts the base's own record of how it was compressed."""
    if not (base_dir / LAYERS).is_file():
        return []
    if not (directory / FACTS).is_file():
        return [f"{FACTS} is missing"]
    stated, made = read_json(directory / FACTS).get("recipe") or {}, read_json(base_dir / LAYERS)["recipe"]
    return [
        f"{FACTS}: {section} is not what the base was made with"
        for section in ("tune", "sparsify", "quantize", "reconstruct")
        if stated.get(section) != made.get(section)
    ]


def _scheme(config: dict[str, Any]) -> Any:
    """What a quantization config says of the weights; the rest is defaults, which tools write differently."""
    grid = config.get(GRID)
    if not isinstance(grid, dict):
        return grid
    groups = grid.get("config_groups")
    groups = groups.values() if isinstance(groups, dict) else []
    weights = [group.get("weights") for group in groups if isinstance(group, dict)]
    parts = ("num_bits", "type", "symmetric", "strategy", "group_size")
    schemes = [[scheme.get(part) for part in parts] for scheme in weights if isinstance(scheme, dict)]
    return [grid.get("quant_method"), grid.get("format"), schemes]


def _shown(config: dict[str, Any], key: str) -> str:
    text = json.dumps(config[key]) if key in config else "not set"
    return text if len(text) < 40 else text[:36] + " ..."
