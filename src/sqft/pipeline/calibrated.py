"""What the stages that compress share: the calibration they look at, and the record of what they did."""

from typing import TYPE_CHECKING, Any

from sqft.artifacts import LAYERS, write_json
from sqft.pipeline.context import StageContext
from sqft.sections import CalibrationSection, QuantizeSection, ReconstructSection, SparsifySection

if TYPE_CHECKING:
    from torch import Tensor

    from sqft.compression import BlockReport, LayerReport

__all__ = ["read_calibration", "record_layers"]


def read_calibration(
    context: StageContext, asking: SparsifySection | QuantizeSection | ReconstructSection
) -> "Tensor | None":
    """The calibration tokens (num_samples, sequence_length), where this section looks at them."""
    if not asking.calibrates:
        return None
    from sqft.data import calibration_tokens, read_items
    from sqft.models import load_tokenizer

    section = context.recipe.calibration or CalibrationSection()
    train = read_items(context.inputs["items"], "train") if section.source == "train" else None
    tokenizer = load_tokenizer(context.dense, trust_remote_code=context.trusts_code)
    return calibration_tokens(section, train, tokenizer, seed=context.recipe.seed)


def record_layers(
    context: StageContext,
    layers: list["LayerReport"],
    tokens: "Tensor | None",
    made_with: set[str],
    blocks: list["BlockReport"] | None = None,
) -> dict[str, Any]:
    """Keep beside the weights what was done to each layer, and with what calibration.

    made_with: the sections that this stage depends on, beside the model and the seed. Another recipe that
    shares the stage may differ in all others, and the certificate compares what is recorded here.
    """
    from sqft.compression.walk import digest_tensor

    rows = [report.to_json() for report in layers]
    fitted = [report.to_json() for report in blocks or ()]
    determining = {"model", "seed", *made_with}
    recipe = context.recipe.model_dump(mode="json", include=determining, exclude_none=True)
    record: dict[str, Any] = {"recipe": recipe, "layers": _untimed(rows)}
    if fitted:
        record["blocks"] = _untimed(fitted)
    if tokens is not None:
        section = context.recipe.calibration or CalibrationSection()
        recipe["calibration"] = section.model_dump(mode="json")
        data = {"data": context.data.train} if section.source == "train" else {}
        record["calibration"] = {"tokens": tokens.numel(), "sha256": digest_tensor(tokens)} | data
    write_json(context.directory / LAYERS, record)
    return {"layers": rows} | ({"blocks": fitted} if fitted else {})


def _untimed(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
