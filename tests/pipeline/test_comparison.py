"""Comparing runs on disk: pairing, seeds, refusals, and what the command prints."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from sqft.cli import run_command_line
from sqft.errors import DataError, WorkspaceError
from sqft.pipeline.comparison import compare_runs, find_measured
from sqft.report import write_report
from sqft.report.comparison import compare_table, differing_table, markdown
from sqft.report.content import ModelRow
from tests.report.invented import invent_report

LOSSES = [0.5, 1.5, 2.0, 0.1, 0.9, 1.1, 0.4, 3.0]
Run = Callable[..., Path]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """`run(name, shift, seed=, ids=, right=, tokens=, recipe=)`: the results of an invented run."""

    def make(
        name: str,
        shift: float = 0.0,
        *,
        seed: int = 0,
        ids: Sequence[str] | None = None,
        right: Sequence[bool] | None = None,
        tokens: int = 2,
        size: int = 100,
        recipe: dict[str, Any] | None = None,
    ) -> Path:
        ids = [f"item{n}" for n in range(8)] if ids is None else list(ids)
        losses = [loss + shift * (n % 3) for n, loss in enumerate(LOSSES[: len(ids)])]
        items = {
            "ids": ids,
            "loss_sums": losses,
            "answer_tokens": [tokens] * len(ids),
            "correct": [n % 2 == 0 for n in range(len(ids))] if right is None else list(right),
        }
        items |= {"general_text": "t", "general_sums": [9 + shift, 8.0], "general_tokens": [4, 4]}
        values = {"name": name, "model": {"source": "m"}, "seed": seed} | (recipe or {})
        rows = [ModelRow("base", 1.0, size_bytes=270), ModelRow("merged", 0.5, size_bytes=size, sparsity=0.5)]
        directory = tmp_path / name
        write_report(invent_report(name=name, recipe=values, models=rows), directory)
        base = items | {"loss_sums": [5 + loss for loss in LOSSES[: len(ids)]]}
        (directory / "items.json").write_text(json.dumps({"base": base, "merged": items}))
        return directory

    return make


def test_gaps_are_paired_by_item(run: Run) -> None:
    data = compare_runs([str(run("one")), str(run("two", 0.3, recipe={"sparsify": {"sparsity": 0.7}}))])
    first, second = data.rows
    assert data.reference == first.label == "one"
    assert first.gaps == {}
    gap = second.gaps["loss"]
    assert gap.difference == pytest.approx(sum(0.3 * (n % 3) for n in range(8)) / 16)
    assert gap.low < gap.difference < gap.high
    assert second.gaps["accuracy"].p_value == 1.0
    assert first.figures["loss"].value == pytest.approx(sum(LOSSES) / 16)
    assert data.differing == {"sparsify": ["-", "sparsity 0.7"]}
    assert data.num_items == {"loss": 8, "accuracy": 8, "general text": 2}
    assert second.gaps["general text"].difference == pytest.approx(0.3 / 8)
    assert "general text (nats per token)" in compare_table(data)[0]


def test_a_share_of_nothing_keeps_its_interval(run: Run) -> None:
    none = [run(f"none-seed{seed}", right=[False] * 8, seed=seed) for seed in (0, 1)]
    few = run("few", right=[True] + [False] * 7, recipe={"train": {}})
    for runs in (none[:1], none):  # Wilson's interval of 0 of 8 reaches to 32 %
        figure = compare_runs([*map(str, runs), str(few)]).rows[0].figures["accuracy"]
        assert (figure.value, figure.low) == (0.0, 0.0)
        assert figure.high == pytest.approx(0.3244, abs=1e-3)


def test_two_seeds_reach_no_further_than_there_is(run: Run) -> None:
    good = [
        run(f"good-seed{seed}", seed=seed, right=[True] * (6 + seed) + [False] * (2 - seed))
        for seed in (0, 1)
    ]
    figure = compare_runs([*map(str, good), str(run("other", recipe={"train": {}}))]).rows[0].figures
    assert figure["accuracy"].high == 1.0
    assert figure["loss"].low >= 0.0


def test_a_single_item_has_no_interval_to_show(run: Run) -> None:
    one, two = run("one", ids=["only"]), run("two", 0.1, ids=["only"], recipe={"train": {}})
    shown = markdown(compare_runs([str(one), str(two)]))
    assert "inf" not in shown
    assert "| one | 0.250 |" in shown


def test_a_rate_whose_best_lies_at_the_edge_is_told(run: Run) -> None:
    shifts = {1e-3: 0.4, 3e-3: 0.2, 1e-2: 0.0}
    paths = [
        str(run(f"rate{rate}", shift, recipe={"train": {"learning_rate": rate, "max_steps": 5}}))
        for rate, shift in shifts.items()
    ]
    (note,) = compare_runs(paths).notes
    assert note.startswith("train.learning_rate: of 0.001, 0.003, 0.01 the highest, 0.01, is best")
    paths.append(str(run("rate3e-2", 0.1, recipe={"train": {"learning_rate": 3e-2, "max_steps": 5}})))
    assert compare_runs(paths).notes == []
    alone = run("longer", 0.1, recipe={"train": {"learning_rate": 9e-2, "max_steps": 9}})
    assert compare_runs([*paths, str(alone)]).notes == []  # nothing but the rate may differ


def test_what_differs_is_told_in_the_fewest_words(run: Run) -> None:
    lora = {"method": "lora", "ranks": [8], "gradient": "exact"}
    trained = {"train": {"max_steps": 10, "batch_size": 8}, "adapters": lora}
    grid = {"quantize": {"method": "gptq", "bits": 3}, "evaluate": {"models": ["base"]}}
    other = {"train": {"max_steps": 20, "batch_size": 8}, "adapters": {"method": "scales"}}
    runs = [run("lora", recipe=trained), run("grid", 0.1, recipe=other | grid)]
    data = compare_runs(list(map(str, runs)))
    assert data.differing == {
        "train.max_steps": ["10", "20"],
        "adapters.method": ["lora", "scales"],
        "adapters.ranks": ["8", "-"],  # and not the gradient: scales have none, lora has the default
        "quantize": ["-", "gptq, bits 3"],
    }
    assert differing_table(data)[0] == ["setting", "lora", "grid"]  # as narrow as it can be
    fewer = compare_runs([str(runs[0]), str(run("third", recipe=trained | {"sparsify": {}}))])
    assert differing_table(fewer) == [["model", "sparsify"], ["lora", "-"], ["third", "yes"]]


def test_seeds_are_one_row(run: Run) -> None:
    runs = [run(f"method-{name}-seed{seed}", shift + seed / 10, seed=seed, recipe={"train": {"x": name}})
            for name, shift in (("a", 0.0), ("b", 0.5)) for seed in (1, 0)]  # fmt: skip
    data = compare_runs([str(path) for path in runs])
    assert [(row.label, len(row.runs)) for row in data.rows] == [("method-a", 2), ("method-b", 2)]
    gap = data.rows[1].gaps["loss"]
    assert gap.by_seed == pytest.approx([gap.difference] * 2)
    assert gap.difference == pytest.approx(0.5 * 7 / 16)
    assert data.differing == {"train.x": ["a", "b"]}


def test_one_that_was_not_trained_stands_against_every_seed(run: Run) -> None:
    tuned = [str(run(f"tuned-seed{seed}", seed / 10, seed=seed, recipe={"train": {}})) for seed in (0, 1)]
    data = compare_runs([f"{run('plain')}:base", *tuned])
    assert [len(row.runs) for row in data.rows] == [1, 2]
    assert len(data.rows[1].gaps["loss"].by_seed) == 2


def test_rows_are_chosen(run: Run) -> None:
    directory = run("one")
    data = compare_runs([str(directory)], every_model=True)
    assert len(data.rows) == 2
    with pytest.raises(DataError, match="nothing to compare"):
        compare_runs([str(directory)])
    with pytest.raises(WorkspaceError, match="no row merge; it has base, merged"):
        find_measured(f"{directory}:merge")


def test_a_folder_of_runs_is_all_of_them(run: Run, tmp_path: Path) -> None:
    run("one")
    run("two", 0.2, recipe={"seed": 0, "train": {}})
    assert [row.label for row in compare_runs([str(tmp_path)]).rows] == ["one", "two"]


def test_folders_called_alike_are_named_by_their_path(run: Run, tmp_path: Path) -> None:
    settings: dict[str, Any]
    for name, settings in (("one", {}), ("two", {"train": {}})):
        (tmp_path / "runs" / name).mkdir(parents=True)
        run(name, recipe=settings).rename(tmp_path / "runs" / name / "merged")
    data = compare_runs([str(tmp_path / "runs" / name / "merged") for name in ("one", "two")])
    assert [row.label for row in data.rows] == ["one/merged", "two/merged"]


def test_other_items_are_refused(run: Run) -> None:
    one = run("one")
    fewer = run("fewer", ids=["item2", "item0", "item1"], recipe={"train": {}})
    message = "loss was measured on 8 and 3 items, of which 3 are the same; --common"
    with pytest.raises(DataError, match=message):
        compare_runs([str(one), str(fewer)])
    data = compare_runs([str(one), str(fewer)], common=True)
    assert data.num_items["loss"] == 3
    assert data.notes[0] == "loss: on the 3 items that all have, of up to 8."
    # Items 2, 0, 1 of the second have the first three losses: the pairing is by item, not by place.
    assert data.rows[1].gaps["loss"].difference == pytest.approx(0.0)
    other = run("other", ids=[f"other prompt {n}" for n in range(8)], recipe={"train": {}})
    with pytest.raises(DataError, match="of which 0 are the same, or asked with another prompt"):
        compare_runs([str(one), str(other)])
    with pytest.raises(DataError, match="no item is common"):
        compare_runs([str(one), str(other)], common=True)


def test_other_tokenizers_are_refused(run: Run) -> None:
    with pytest.raises(DataError, match="tokenizers split the answers differently"):
        compare_runs([str(run("one")), str(run("two", tokens=3, recipe={"train": {}}))])


@pytest.mark.parametrize("broken", ["nothing", "no items", "damaged items", "no file"])
def test_what_holds_nothing_is_told(broken: str, run: Run, tmp_path: Path) -> None:
    directory = run("one")
    messages = {"nothing": "holds no measured model", "no items": "has no items.json"}
    messages |= {"damaged items": "is damaged", "no file": "holds no measured model"}
    if broken == "nothing":
        (directory / "report.json").unlink()
    elif broken == "no items":
        (directory / "items.json").unlink()
    elif broken == "damaged items":
        (directory / "items.json").write_text("{")
    with pytest.raises(WorkspaceError, match=messages[broken]):
        compare_runs([str(tmp_path / "none" if broken == "no file" else directory)])


def test_the_command(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [str(run("one", size=200)), str(run("a<b", 0.3, recipe={"sparsify": {"sparsity": 0.7}}))]
    assert run_command_line(["compare", *runs]) == 0
    shown = capsys.readouterr().out
    assert "to one" in shown
    assert "sparsity 0.7" in shown
    page = (tmp_path / "comparison.html").read_text()
    assert "a&lt;b" in page
    assert "a<b<" not in page
    assert page.count("<figure>") == 3  # three measures against size; the sparsity is the same
    assert run_command_line(["compare", *runs, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["rows"][1]["gaps"]["loss"]["difference"] > 0
    assert run_command_line(["compare", *runs, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| model |")
    (tmp_path / "comparison.html").write_text("my own")
    assert run_command_line(["compare", *runs]) == 0
    assert "comparison-2.html" in capsys.readouterr().out
    assert (tmp_path / "comparison.html").read_text() == "my own"
