"""What an export or a merge must not write over."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from sqft.directories import check_destination, new_directory
from sqft.errors import ExportError
from sqft.export import export_adapter, export_model
from tests.export.test_adapter_export import write_adapter
from tests.foreign.merges import merge


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
    with pytest.raises(ExportError, match="is not a directory"):
        export_model(model, "gptq", papers / "thesis.txt")


def test_adapters_and_merges_keep_to_it_too(model: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "runs" / "adapter"
    write_adapter(model, adapter)
    for output in (adapter, model, tmp_path / "runs"):
        with pytest.raises(ExportError, match="which is read"):
            export_adapter(adapter, model, "gguf", output)
        with pytest.raises(ExportError, match="which is read"):
            merge(model, adapter, output)
    with pytest.raises(ExportError, match="which is read"):
        export_adapter(adapter, None, "peft", adapter)
    assert (adapter / "adapter_config.json").is_file()
    for _ in range(2):
        export_adapter(adapter, model, "gguf", tmp_path / "lora")
    assert (model / "config.json").is_file()


def test_what_was_edited_or_belongs_to_a_run_is_not_replaced(tmp_path: Path) -> None:
    for _ in range(2):
        check_destination(tmp_path / "out")
        with new_directory(tmp_path / "out") as partial:
            (partial / "README.md").write_text("a card")
    (tmp_path / "out" / "README.md").write_text("a card, with a word more")
    with pytest.raises(ExportError, match=r"holds README\.md, .* or which changed since"):
        check_destination(tmp_path / "out", "nf4:elsewhere", None)
    with new_directory(tmp_path / "stage", about={"stage": "merge"}):
        pass
    with pytest.raises(ExportError, match="is a result of `sqft run`"):
        check_destination(tmp_path / "stage")
