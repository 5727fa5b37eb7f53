"""The search for a sub-adapter: heuristics that look at nothing, hill climbing, and a surrogate."""

import hashlib
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from sqft.adapters import SearchSpace, SubAdapter
from sqft.artifacts import digest_json, sync_path
from sqft.errors import TrainingError, WorkspaceError
from sqft.progress import SILENT, Progress, errors_only
from sqft.search.hill_climb import HillClimb
from sqft.search.proposer import Listed, Proposer
from sqft.search.result import SearchResult, Trial
from sqft.search.surrogate import Surrogate, mean_rank, surrogate_candidates
from sqft.sections import SearchSection

__all__ = ["METHODS", "Objective", "search_sub_adapter"]

logger = logging.getLogger(__name__)

Objective = Callable[[SubAdapter], float]


def search_sub_adapter(
    space: SearchSpace,
    objective: Objective,
    section: SearchSection,
    *,
    slopes: Callable[[], Surrogate] | None = None,
    seed: int = 0,
    storage: Path,
    progress: Progress = SILENT,
) -> SearchResult:
    """Choose one sub-adapter of a super-adapter.

    median, maximal, minimal: chosen from the space alone, the objective is never called. hill_climb: at most
    `section.num_trials` sub-adapters are evaluated, the median first; the lowest loss wins, the first of
    equals. surrogate: as many, the median and those that look best by `slopes` (`rank_slopes`). Finished
    trials are kept in `storage`, an Optuna journal: a call that finds some there goes on from them and ends
    with the same result as a search that was never interrupted.

    Raises: TrainingError if the space is empty, the smallest rank is asked for and is 0, or the objective is
    not a finite number; WorkspaceError if the journal is damaged or of another search.

    Source: arXiv 2410.03750, section 3.2.
    """
    if not space.groups:
        raise TrainingError("there is nothing to search: the adapter has no rank group")
    return METHODS[section.method](space, objective, section, seed, storage, progress, slopes)


def _median(space: SearchSpace, *_: Any) -> SearchResult:
    return SearchResult(space.median())


def _maximal(space: SearchSpace, *_: Any) -> SearchResult:
    return SearchResult(space.maximal())


def _minimal(space: SearchSpace, *_: Any) -> SearchResult:
    if not min(space.ranks):
        raise TrainingError("the smallest rank everywhere is 0, which adapts nothing; choose another method")
    return SearchResult(space.minimal())


def _hill_climb(
    space: SearchSpace,
    objective: Objective,
    section: SearchSection,
    seed: int,
    storage: Path,
    progress: Progress,
    slopes: object,
) -> SearchResult:
    sampler = HillClimb(space, seed, section.neighbours)
    there = len(space.ranks) ** len(space.groups) - (0 in space.ranks)  # all but rank 0 everywhere
    wanted = min(section.num_trials, there)
    return _evaluate(space, objective, sampler, wanted, [seed, section.neighbours], storage, progress)


def _surrogate(
    space: SearchSpace,
    objective: Objective,
    section: SearchSection,
    seed: int,
    storage: Path,
    progress: Progress,
    slopes: Callable[[], Surrogate] | None,
) -> SearchResult:
    if slopes is None:
        raise TrainingError("search.method surrogate needs the slopes of the ranks, and nothing gives them")
    surrogate = slopes()
    listed = list(surrogate_candidates(space, surrogate, section.budget))
    if section.budget is None or mean_rank(space.median()) <= section.budget:
        listed.insert(0, space.median())
    if not listed:
        raise TrainingError(f"search.budget: {section.budget} leaves rank 0 everywhere, which adapts nothing")
    listed = listed[: section.num_trials]
    kind = ["surrogate", seed, section.budget]
    return _evaluate(space, objective, Listed(space, listed), len(listed), kind, storage, progress)


def _evaluate(
    space: SearchSpace,
    objective: Objective,
    sampler: Proposer,
    wanted: int,
    kind: list[Any],
    storage: Path,
    progress: Progress,
) -> SearchResult:
    """Evaluate as many sub-adapters as wanted. kind: what tells this search from others in its journal."""
    quiet = errors_only(optuna.logging.get_verbosity, optuna.logging.set_verbosity)
    with quiet, progress.task("search", wanted) as advance:
        study = _open_study(storage, sampler, digest_json([space.groups, space.ranks, *kind]), space)
        advance(min(wanted, len(_finished(study, space))))
        while len(_finished(study, space)) < wanted:
            trial = study.ask()
            ranks = {group: trial.suggest_categorical(group, list(space.ranks)) for group in space.groups}
            loss = float(objective(ranks))
            if not math.isfinite(loss):
                study.tell(trial, state=TrialState.FAIL)
                raise TrainingError(
                    f"the loss of a sub-adapter is {loss}; check the search items and the adapter"
                )
            study.tell(trial, loss)
            _seal(storage)
            advance(1)
        trials = _finished(study, space)[:wanted]
    return SearchResult(min(trials, key=lambda trial: trial.loss).ranks, trials)


METHODS: dict[str, Callable[..., SearchResult]] = {
    "hill_climb": _hill_climb,
    "maximal": _maximal,
    "median": _median,
    "minimal": _minimal,
    "surrogate": _surrogate,
}


def _open_study(storage: Path, sampler: Proposer, name: str, space: SearchSpace) -> optuna.Study:
    """Open the study in the journal, after clearing away what a killed process left behind."""
    storage.parent.mkdir(parents=True, exist_ok=True)
    sealed = _seals(storage).exists()
    for lock in storage.parent.glob(f"{storage.name}.lock*"):
        lock.unlink()  # of a process that was killed; the workspace's own lock keeps others out
    _cut_to_seal(storage)
    try:
        study = optuna.create_study(
            study_name=name,
            storage=JournalStorage(JournalFileBackend(str(storage))),
            sampler=sampler,
            direction="minimize",
            load_if_exists=True,
        )
        if len(study.get_trials(deepcopy=False)) == 0 and len(optuna.get_all_study_names(study._storage)) > 1:
            raise WorkspaceError(f"{storage} holds another search; remove it, or choose another place")
        if _finished(study, space) and not sealed:
            raise WorkspaceError(
                f"{storage} does not record which of its trials were finished; remove it to search anew"
            )
        if not sealed:
            _seal(storage)
    except (ValueError, KeyError) as error:
        raise WorkspaceError(f"{storage} is damaged ({error}); remove it to search anew") from error
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return study


def _seal(storage: Path) -> None:
    """Record that the journal is whole as it is now, by its length and digest, once it is on the disk."""
    sync_path(storage)
    with _seals(storage).open("ab") as file:
        file.write(_sealed(storage.read_bytes()) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _cut_to_seal(storage: Path) -> None:
    """Cut the journal back to the longest beginning that is known to be undamaged."""
    content = storage.read_bytes() if storage.exists() else b""
    seals = _seals(storage).read_bytes().splitlines() if _seals(storage).exists() else []
    kept = content.rfind(b"\n") + 1
    while seals and kept and _sealed(content[:kept]) not in seals:
        kept = content.rfind(b"\n", 0, kept - 1) + 1
    if seals and _sealed(content[:kept]) != seals[-1]:
        logger.warning("%s is not as it was written; the search goes on from before it", storage)
    if kept < len(content):
        storage.write_bytes(content[:kept])


def _sealed(content: bytes) -> bytes:
    return f"{len(content)} {hashlib.sha256(content).hexdigest()}".encode()


def _seals(storage: Path) -> Path:
    return storage.with_name(f".{storage.name}.sha256")


def _finished(study: optuna.Study, space: SearchSpace) -> list[Trial]:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return [
        Trial(number, {group: trial.params[group] for group in space.groups}, float(trial.value))
        for number, trial in enumerate(trials)
    ]
