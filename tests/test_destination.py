"""What an export or a merge must not write over."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.artifacts import check_destination
from sqft.errors import ExportError
from sqft.export import export_adapter, export_model
from sqft.foreign import merge_foreign
from tests.export.test_adapter_export import write_adapter


@pytest.fixture
def model(merged_dir: Callable[..., Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(merged_dir(), tmp_path / "runs" / "model"))


def test_an_export_never_replaces_what_it_reads(model: Path) -> None:
    before = sorted(model.iterdir())
    for output in (model, model.parent, model / "..", model.parent / "x" / ".." / "model"):
        with pytest.raises(ExportError, match="which is read; choose another output"):
            export_model(model, "gptq", output)
    with pytest.raises(ExportError, match="lies inside"):
        export_model(model, "gptq", model / "gptq")
    partial = model.rename(model.with_name("out.partial"))
    with pytest.raises(ExportError, match=r"would delete .*out.partial"):
        export_model(partial, "gptq", partial.with_name("out"))
    assert [path.name for path in before] == sorted(path.name for path in partial.iterdir())


def test_an_export_never_deletes_what_sqft_did_not_write(model: Path, tmp_path: Path) -> None:
    papers = tmp_path / "papers"
    papers.mkdir()
    export_model(model, "gptq", papers)  # empty is fine
    export_model(model, "gptq", papers)  # so is an earlier export
    (papers / "thesis.txt").write_text("years of work")
    with pytest.raises(ExportError, match=r"holds thesis\.txt, which no export"):
        export_model(model, "gptq", papers)
    (papers / "sqft_export.json").unlink()
    with pytest.raises(ExportError, match="which no export or merge of sqft wrote"):
        export_model(model, "gptq", papers)
    assert (papers / "thesis.txt").read_text() == "years of work"
    with pytest.raises(ExportError, match="is no directory"):
        export_model(model, "gptq", papers / "thesis.txt")


def test_adapters_and_merges_keep_to_it_too(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "runs" / "adapter"
    write_adapter(model, adapter)
    for output in (adapter, model, tmp_path / "runs"):
        with pytest.raises(ExportError, match="which is read"):
            export_adapter(adapter, model, "gguf", output)
        with pytest.raises(ExportError, match="which is read"):
            merge_foreign(model, adapter, output)
    with pytest.raises(ExportError, match="which is read"):
        export_adapter(adapter, None, "peft", adapter)
    assert (adapter / "adapter_config.json").is_file()
    for _ in range(2):
        export_adapter(adapter, model, "gguf", tmp_path / "lora")
    assert (model / "config.json").is_file()


def test_a_merge_may_be_repeated_but_not_over_an_export_inside_it(tmp_path: Path) -> None:
    (tmp_path / "sqft_merge.json").write_text(json.dumps({}))
    (tmp_path / "model.safetensors").write_text("")
    check_destination(tmp_path)
    (tmp_path / "gguf").mkdir()
    with pytest.raises(ExportError, match="holds gguf"):
        check_destination(tmp_path, "nf4:elsewhere", None)
