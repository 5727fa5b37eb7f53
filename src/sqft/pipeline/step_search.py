"""The stage `search`."""

import shutil
from dataclasses import asdict
from typing import Any

from sqft.artifacts import SUB_ADAPTER, TRIALS, Manifest, digest_json, write_json
from sqft.errors import CertificateError
from sqft.pipeline.context import ADAPTER, StageContext, write_adapter_facts
from sqft.pipeline.opening import open_adapted
from sqft.sections import SearchSection

__all__ = ["search"]


def search(context: StageContext) -> dict[str, Any]:
    """The super-adapter → the ranks that do best on the search items, cut out as an adapter of its own."""
    from sqft.adapters import SearchSpace, codes_digest, extract_sub_adapter, set_ranks
    from sqft.adapters.space import adapter_config
    from sqft.data import read_items
    from sqft.evaluation import evaluate_loss
    from sqft.evaluation.gradients import backward_loss
    from sqft.search import SearchResult, rank_slopes, search_sub_adapter

    section = context.recipe.search or SearchSection()
    adapted = open_adapted(context.base, context.inputs["train"] / ADAPTER, **context.opening).eval()
    items = read_items(context.inputs["items"], "search") if section.evaluates else []
    loss_on = context.data.loss_on

    def objective(sub_adapter: dict[str, int]) -> float:
        set_ranks(adapted, sub_adapter)
        return evaluate_loss(adapted, items, loss_on=loss_on).loss

    space = SearchSpace.of(adapted)
    result = (
        SearchResult({})
        if not space.groups
        else search_sub_adapter(
            space,
            objective,
            section,
            slopes=lambda: rank_slopes(adapted, lambda: backward_loss(adapted, items, loss_on=loss_on)),
            seed=context.recipe.seed,
            storage=context.directory / TRIALS,
            progress=context.progress,
        )
    )
    shutil.rmtree(context.directory / ADAPTER, ignore_errors=True)  # of a run that was killed below
    extract_sub_adapter(adapted, result.best, context.directory / ADAPTER)
    write_adapter_facts(context)
    digest = None
    if context.adapters.method != "lora":
        trained = Manifest.read(context.inputs["train"]).metrics["codes_digests"]
        for sub_adapter in (space.maximal(), result.best):
            set_ranks(adapted, sub_adapter)
            digest = codes_digest(adapted)
            _check_digest(digest, trained.get(digest_json(sub_adapter)))
    write_json(context.directory / SUB_ADAPTER, asdict(result))
    return {
        "ranks": result.best or adapter_config(adapted).rank_pattern,
        "codes_digest": digest,
        "num_trials": len(result.trials),
    }


def _check_digest(digest: str, trained: str | None) -> None:
    """The adapter read from disk must give the codes that the model in memory had when training ended."""
    if trained is not None and trained != digest:
        raise CertificateError(
            "the saved adapter gives other codes than the model had after training; delete the train stage "
            "and run again"
        )
