"""What a compressed model says of the calibration it was made with."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sqft.compression.walk import digest_tensor
from sqft.data import calibration_tokens, read_items
from sqft.models import load_tokenizer
from sqft.pipeline import parse_recipe
from sqft.pipeline.context import StageContext
from sqft.pipeline.step_items import prepare_items
from sqft.pipeline.step_quantize import quantize
from sqft.pipeline.step_sparsify import sparsify
from sqft.progress import SILENT
from sqft.sections import CalibrationSection

Maker = Callable[..., Path]


def record_of(step: Callable[[StageContext], Any], directory: Path, out: Path, **sections: Any) -> Any:
    """The record of one stage of a recipe with these sections."""
    recipe = parse_recipe({"model": str(directory), **sections})
    inputs = {"model": directory, "sparsify": out / "sparsify", "items": out / "items"}
    if recipe.data and not inputs["items"].exists():
        inputs["items"].mkdir(parents=True)
        prepare_items(StageContext(recipe, "", out, inputs, "cpu", SILENT, inputs["items"]))
    step(StageContext(recipe, "", out, inputs, "cpu", SILENT, out / step.__name__))
    return json.loads((out / step.__name__ / "sqft_layers.json").read_text())


def test_the_calibration_is_recorded_also_where_nobody_names_it(
    tiny_model_dir: Maker, tmp_path: Path
) -> None:
    directory, items = tiny_model_dir("llama"), tmp_path / "items.jsonl"
    texts = [{"question": f"{n} plus {n}, " * 15, "answer": str(2 * n)} for n in range(300)]
    items.write_text("".join(json.dumps(text) + "\n" for text in texts))
    data = {"train": str(items), "search_items": 5, "test_items": 5}
    record = record_of(sparsify, directory, tmp_path, data=data, sparsify={})
    section = CalibrationSection()
    assert record["recipe"]["calibration"] == section.model_dump()
    tokens = calibration_tokens(
        section, read_items(tmp_path / "items", "train"), load_tokenizer(directory), seed=0
    )
    assert record["calibration"] == {
        "tokens": 64 * 256,
        "sha256": digest_tensor(tokens),
        "data": str(items),
    }


def test_a_file_is_recorded_by_its_tokens_and_no_calibration_as_none(
    tiny_model_dir: Maker, tmp_path: Path
) -> None:
    directory, texts = tiny_model_dir("llama"), tmp_path / "texts.txt"
    texts.write_text("".join(f"{n} plus {n} is {2 * n}\n" for n in range(200)))
    calibration = {"source": str(texts), "num_samples": 8, "sequence_length": 32}
    sections = {
        "calibration": calibration,
        "sparsify": {"method": "wanda"},
        "quantize": {"method": "rtn", "group_size": 32},
    }
    record = record_of(sparsify, directory, tmp_path, **sections)
    assert record["recipe"]["calibration"]["source"] == str(texts)
    assert "quantize" not in record["recipe"]  # another recipe may share these masks and quantize otherwise
    assert record["calibration"].keys() == {"tokens", "sha256"}
    assert record["calibration"]["tokens"] == 256
    rounded = record_of(quantize, directory, tmp_path, **sections)
    assert "calibration" not in rounded
    assert "calibration" not in rounded["recipe"]
