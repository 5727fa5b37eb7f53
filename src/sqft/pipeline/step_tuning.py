"""The stage `tune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqft.errors import ModelError
from sqft.pipeline.context import ADAPTER, TRAINING, StageContext
from sqft.pipeline.step_training import drop_checkpoints, train_on
from sqft.sections import TuneSection

if TYPE_CHECKING:
    from sqft.models import Checkpoint

__all__ = ["tune"]


def tune(context: StageContext) -> dict[str, Any]:
    """The dense model → the same with a LoRA merged into it: trained here, or taken as it exists already."""
    section = context.recipe.tune or TuneSection()
    if section.model is not None:
        return _take_model(context)
    if section.adapter is not None:
        return _merge(context, context.inputs["tuned"])
    from sqft.adapters import SearchSpace, extract_sub_adapter
    from sqft.foreign import check_dense
    from sqft.models import open_checkpoint

    model = context.inputs["model"]
    check_dense(open_checkpoint(model, trust_remote_code=context.trusts_code))
    inside = context.working_in(context.directory / TRAINING)
    inside.directory.mkdir(exist_ok=True)
    adapted, metrics = train_on(inside, model, section.adapters, section, context.recipe.tuning_seed)
    extract_sub_adapter(adapted, SearchSpace.of(adapted).maximal(), inside.directory / ADAPTER)
    del adapted
    merged = _merge(context, inside.directory / ADAPTER)
    drop_checkpoints(inside)
    return metrics | merged


def _merge(context: StageContext, adapter: Path) -> dict[str, Any]:
    from sqft.adapters.lora_files import adapter_digests
    from sqft.foreign import merge_dense
    from sqft.models import open_checkpoint

    base = open_checkpoint(context.inputs["model"], trust_remote_code=context.trusts_code)
    merge_dense(base, adapter, context.directory, facts=_facts(context), progress=context.progress)
    return {"adapter": adapter_digests(adapter)}


def _take_model(context: StageContext) -> dict[str, Any]:
    """A tuned model that exists already, in the files of a stage.

    Raises: ModelError if it is not a tuned form of the recipe's model: of other shapes, or another tokenizer.
    """
    from sqft.models import CheckpointWriter, load_tokenizer, open_checkpoint

    code = {"trust_remote_code": context.trusts_code}
    base, tuned = (open_checkpoint(context.inputs[name], **code) for name in ("model", "tuned"))
    if tuned.grid is not None:
        raise ModelError(f"{tuned.directory} is quantized; tune.model is a dense model")
    if _shapes(base) != _shapes(tuned):
        raise ModelError(f"{tuned.directory} has weights of other names or shapes than {base.directory}")
    known, other = (load_tokenizer(path.directory, **code).get_vocab() for path in (base, tuned))
    if any(other.get(token) != number for token, number in known.items()):
        raise ModelError(f"{tuned.directory} has another tokenizer than {base.directory}; name it as model")
    CheckpointWriter(context.directory, tuned).close(_facts(context))
    return {}


def _shapes(checkpoint: "Checkpoint") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in checkpoint.skeleton().state_dict().items()}


def _facts(context: StageContext) -> dict[str, Any]:
    """What sqft.json of a tuned model says; only what enters the stage's identity."""
    recipe = context.recipe
    trains = recipe.tune is not None and recipe.tune.trains
    parts = {"model", "tune"} | ({"seed"} if trains else set())
    facts = {
        "kind": "tuned",
        "lineage": context.lineage("tune"),
        "recipe": recipe.model_dump(mode="json", include=parts, exclude_none=True),
    }
    return facts | ({"prompt": context.data.rendering()} if trains else {})
