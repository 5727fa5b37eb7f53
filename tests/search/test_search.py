"""The contract that every search method keeps, and what is special about hill climbing."""

import math
import random
from pathlib import Path
from typing import Any, get_args

import pytest

from sqft.adapters import SearchSpace, SubAdapter
from sqft.errors import TrainingError, WorkspaceError
from sqft.search import METHODS, SearchResult, search_sub_adapter
from sqft.sections import SearchSection

SPACE = SearchSpace({f"group{i}": (f"layer{i}",) for i in range(6)}, (32, 24, 16, 8))
TARGET = dict(zip(SPACE.groups, (32, 8, 16, 24, 16, 8), strict=True))


# Right about every group but the first, whose other end it takes for the best.
SURROGATE = {
    group: {rank: abs(rank - (8 if group == "group0" else TARGET[group])) / 8 for rank in SPACE.ranks}
    for group in SPACE.groups
}


def distance(ranks: SubAdapter) -> float:
    return 1.0 + sum(abs(ranks[group] - TARGET[group]) for group in TARGET) / 8


def search(
    method: str, directory: Path, objective: Any = distance, seed: int = 3, **fields: Any
) -> SearchResult:
    section = SearchSection(method=method, **fields)
    return search_sub_adapter(
        SPACE, objective, section, slopes=lambda: SURROGATE, seed=seed, storage=directory / "trials.log"
    )


@pytest.mark.parametrize("method", sorted(METHODS))
class TestEveryMethod:
    def test_chooses_a_member_of_the_space(self, method: str, tmp_path: Path) -> None:
        best = search(method, tmp_path).best
        assert list(best) == list(SPACE.groups)
        assert set(best.values()) <= set(SPACE.ranks)

    def test_is_a_function_of_the_seed(self, method: str, tmp_path: Path) -> None:
        assert search(method, tmp_path / "a") == search(method, tmp_path / "b")
        other = search(method, tmp_path / "c", seed=4)
        if method == "hill_climb":
            assert other.trials != search(method, tmp_path / "a").trials

    def test_the_best_trial_wins(self, method: str, tmp_path: Path) -> None:
        result = search(method, tmp_path)
        if result.trials:
            assert distance(result.best) == result.best_loss == min(t.loss for t in result.trials)
        else:
            assert math.isnan(result.best_loss)

    def test_an_empty_space_is_refused(self, method: str, tmp_path: Path) -> None:
        with pytest.raises(TrainingError, match="nothing to search"):
            search_sub_adapter(
                SearchSpace({}, (8,)), distance, SearchSection(method=method), storage=tmp_path / "t"
            )


def test_the_table_holds_what_the_section_allows() -> None:
    assert set(METHODS) == set(get_args(SearchSection.model_fields["method"].annotation))


@pytest.mark.parametrize(("method", "rank"), [("maximal", 32), ("median", 16), ("minimal", 8)])
def test_heuristics_look_at_nothing(method: str, rank: int, tmp_path: Path) -> None:
    def objective(ranks: SubAdapter) -> float:
        raise AssertionError("evaluated")

    result = search(method, tmp_path, objective)
    assert result == SearchResult(dict.fromkeys(SPACE.groups, rank))
    assert not list(tmp_path.iterdir())


def test_hill_climbing_starts_at_the_median_and_climbs(tmp_path: Path) -> None:
    result = search("hill_climb", tmp_path, num_trials=60)
    assert result.trials[0].ranks == SPACE.median()
    assert len(result.trials) == 60
    assert len({tuple(trial.ranks.values()) for trial in result.trials}) == 60
    assert result.best_loss <= distance(SPACE.median()) - 3


@pytest.mark.parametrize("method", ["hill_climb", "surrogate"])
def test_rank_0_everywhere_is_never_looked_at(method: str, tmp_path: Path) -> None:
    space = SearchSpace({"a": ("a",), "b": ("b",)}, (8, 0))
    section = SearchSection(
        method=method, num_trials=9, **({"neighbours": 1} if method == "hill_climb" else {})
    )
    slopes = {group: {8: 1.0, 0: 0.0} for group in space.groups}

    def objective(ranks: SubAdapter) -> float:
        assert any(ranks.values())
        return float(sum(ranks.values()))

    result = search_sub_adapter(space, objective, section, slopes=lambda: slopes, storage=tmp_path / "log")
    assert sorted(result.best.values()) == [0, 8]
    assert len(result.trials) == (3 if method == "hill_climb" else 2)
    with pytest.raises(TrainingError, match="rank everywhere is 0"):
        search_sub_adapter(space, objective, SearchSection(method="minimal"), storage=tmp_path / "other")


def test_a_killed_search_ends_the_same(tmp_path: Path) -> None:
    whole = search("hill_climb", tmp_path / "whole", num_trials=12)
    for killed_after in (0, 1, 7):
        calls: list[int] = []

        def objective(ranks: SubAdapter, calls: list[int] = calls, limit: int = killed_after) -> float:
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(1)
            return distance(ranks)

        directory = tmp_path / str(killed_after)
        with pytest.raises(KeyboardInterrupt):
            search("hill_climb", directory, objective, num_trials=12)
        (directory / "trials.log.lock").symlink_to("trials.log")  # killed while it held the lock
        with (directory / "trials.log").open("ab") as file:
            file.write(b'{"op_code": 4, "wor')  # and while it wrote a line
        again: list[SubAdapter] = []

        def record(ranks: SubAdapter, again: list[SubAdapter] = again) -> float:
            again.append(ranks)
            return distance(ranks)

        resumed = search("hill_climb", directory, record, num_trials=12)
        assert resumed == whole
        assert len(again) == 12 - killed_after


def test_a_finished_search_is_not_repeated(tmp_path: Path) -> None:
    first = search("hill_climb", tmp_path, num_trials=5)

    def objective(ranks: SubAdapter) -> float:
        raise AssertionError("evaluated")

    assert search("hill_climb", tmp_path, objective, num_trials=5) == first


def test_a_small_space_is_looked_at_once(tmp_path: Path) -> None:
    space = SearchSpace({"a": ("x",), "b": ("y",)}, (8, 4))
    result = search_sub_adapter(
        space,
        lambda ranks: float(sum(ranks.values())),
        SearchSection(method="hill_climb", num_trials=50),
        storage=tmp_path / "trials.log",
    )
    assert len(result.trials) == 4
    assert result.best == {"a": 4, "b": 4}


def test_a_single_rank_needs_one_trial(tmp_path: Path) -> None:
    space = SearchSpace({"a": ("x",)}, (8,))
    result = search_sub_adapter(
        space, lambda ranks: 1.0, SearchSection(method="hill_climb"), storage=tmp_path / "trials.log"
    )
    assert result.best == {"a": 8}
    assert len(result.trials) == 1


def test_a_loss_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="loss of a sub-adapter is nan"):
        search("hill_climb", tmp_path, lambda ranks: math.nan)


def test_a_journal_of_another_search(tmp_path: Path) -> None:
    search("hill_climb", tmp_path, num_trials=2)
    with pytest.raises(WorkspaceError, match="holds another search"):
        search("hill_climb", tmp_path, num_trials=2, neighbours=3)


def test_a_damaged_journal(tmp_path: Path) -> None:
    (tmp_path / "trials.log").write_text("nonsense\nnonsense\n")
    with pytest.raises(WorkspaceError, match="is damaged"):
        search("hill_climb", tmp_path)


def test_a_journal_damaged_between_two_runs_gives_no_other_result(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = search("hill_climb", tmp_path / "whole", num_trials=5)
    draw = random.Random(0)
    for attempt in range(6):
        directory = tmp_path / str(attempt)
        search("hill_climb", directory, num_trials=3)
        journal = directory / "trials.log"
        content = bytearray(journal.read_bytes())
        if attempt % 3:
            content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del content[draw.randrange(len(content)) :]
        journal.write_bytes(content)
        caplog.clear()
        assert search("hill_climb", directory, num_trials=5) == whole
        assert [record.getMessage() for record in caplog.records] == [
            f"{journal} is not as it was written; the search goes on from before it"
        ]


def test_trials_that_nothing_proves_are_not_used(tmp_path: Path) -> None:
    search("hill_climb", tmp_path, num_trials=3)
    (tmp_path / ".trials.log.sha256").unlink()
    with pytest.raises(WorkspaceError, match="does not record"):
        search("hill_climb", tmp_path, num_trials=5)
