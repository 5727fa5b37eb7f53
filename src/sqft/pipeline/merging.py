"""A base and an adapter trained by sqft → one certified model, in a recipe and without one."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sqft.artifacts import FACTS, LAYERS, read_object
from sqft.checks import Check, require_passed
from sqft.directories import check_destination, new_directory
from sqft.errors import CertificateError
from sqft.pipeline.opening import BasePrecision, open_adapted
from sqft.progress import SILENT, Progress
from sqft.sections import QuantizeSection

__all__ = ["merge_trained", "write_certified"]

REFERENCE_ITEMS = 4
REFERENCE_TOKENS = 48  # of each, where there is no data to take them from


def write_certified(
    directory: Path,
    base: Path,
    adapter: Path,
    *,
    token_ids: Sequence[Sequence[int]],
    facts: dict[str, Any],
    quantize: QuantizeSection | None,
    trained_digest: str | None = None,
    base_precision: BasePrecision = "latent",
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> list[Check]:
    """Merge into a directory, open it again, and certify it; a model that fails a check is removed.

    token_ids: items whose logits are kept as reference, the first few of them. facts: what sqft.json says
    beside the heads, the weights outside the blocks that `quantize`, or what made the base, put on a grid of
    8 bits. trained_digest: as `certify_model` takes it.

    Raises: AdapterError if the adapter does not belong to the base, or cannot be merged; CertificateError if
    the merged model is not the one that was trained.
    """
    from sqft.adapters import merge_adapters, merge_norms
    from sqft.adapters.space import adapter_config
    from sqft.certificate import certify_model
    from sqft.compression import choose_heads
    from sqft.models import load_model, open_checkpoint, outline_skeleton, read_masks, write_model

    loading: dict[str, Any] = {"device": device, "trust_remote_code": trust_remote_code}
    adapted = open_adapted(base, adapter, base_precision=base_precision, **loading).eval()
    merged = merge_adapters(adapted)
    masks = read_masks(base)
    if adapter_config(adapted).low_rank:  # codes alone, which trained scales stand on, tell no mask
        existing = {name: weight.mask for name, weight in merged.items() if name not in masks}
        masks |= {name: mask for name, mask in existing.items() if not bool(mask.all())}
    source = open_checkpoint(base, trust_remote_code=trust_remote_code)
    heads = read_object(base / FACTS).get("heads") or []  # of a base that was merged before
    if quantize:
        heads = choose_heads(outline_skeleton(source.skeleton()), quantize)
    write_model(
        directory,
        source,
        {name: weight.weight for name, weight in merged.items()},
        others={f"{name}.weight": weight for name, weight in merge_norms(adapted).items()},
        masks=masks,
        facts=facts | {"heads": heads},
    )
    checks = certify_model(
        directory,
        base_dir=base,
        adapter_dir=adapter,
        adapted=adapted,
        merged=load_model(directory, **loading),
        token_ids=[list(ids) for ids in token_ids[:REFERENCE_ITEMS]],
        trained_digest=trained_digest,
        trust_remote_code=trust_remote_code,
        progress=progress,
    )
    try:
        require_passed(checks, "the merged model is not the one that was trained")
    except CertificateError:
        shutil.rmtree(directory)
        raise
    return checks


def merge_trained(
    base_dir: Path,
    adapter_dir: Path,
    output_dir: Path,
    *,
    device: str = "cpu",
    trust_remote_code: bool = False,
    progress: Progress = SILENT,
) -> list[Check]:
    """Merge an adapter that sqft trained into the base that it stands on, and certify the result.

    What the model says of itself comes from the records beside base and adapter. The reference logits are of
    the first paragraphs of the general text, as there is no data here.

    Raises: as `write_certified`; WorkspaceError if the output is in the way of something.
    """
    from sqft.evaluation import general_path
    from sqft.models import load_tokenizer

    config = read_object(adapter_dir / "adapter_config.json")
    recipe = read_object(base_dir / LAYERS).get("recipe") or {}
    quantize = QuantizeSection.model_validate(recipe["quantize"]) if recipe.get("quantize") else None
    compressing = recipe.get("sparsify") or recipe.get("quantize") or {}
    paragraphs = general_path("package").read_text(encoding="utf-8").split("\n\n")
    longest = sorted(paragraphs, key=len, reverse=True)[:REFERENCE_ITEMS]
    tokenizer = load_tokenizer(base_dir, trust_remote_code=trust_remote_code)
    facts = {
        "kind": "merged",
        "method": config.get("method"),
        "pattern": compressing.get("pattern"),
        "quantization": quantize.model_dump(mode="json") if quantize else None,
        "ranks": config.get("rank_pattern") or {},
        "recipe": recipe,
    }
    prompt = read_object(adapter_dir / FACTS).get("prompt")
    check_destination(output_dir, base_dir, adapter_dir)
    with new_directory(output_dir) as partial:
        return write_certified(
            partial,
            base_dir,
            adapter_dir,
            token_ids=[tokenizer(text)["input_ids"][:REFERENCE_TOKENS] for text in longest],
            facts=facts | ({"prompt": prompt} if prompt else {}),
            quantize=quantize,
            device=device,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
