"""The stage `teacher`."""

import time
from typing import Any

from sqft.artifacts import TEACHER
from sqft.pipeline.context import StageContext
from sqft.sections import DistillationSection

__all__ = ["teach"]


def teach(context: StageContext) -> dict[str, Any]:
    """A model → what it predicts for the items and texts of a training, once for all trainings."""
    from sqft.data import read_items
    from sqft.data.calibration import text_tokens
    from sqft.models import load_model, load_tokenizer, open_checkpoint
    from sqft.training.teacher import Teacher, check_same_tokens, predict_items, predict_texts

    recipe = context.recipe
    section = recipe.distillation or DistillationSection(item_weight=1.0)
    code = {"trust_remote_code": context.trusts_code}
    directory = context.inputs[recipe.teacher_stage]
    tokenizer = load_tokenizer(context.inputs["model"], **code)
    if section.is_named:
        check_same_tokens(tokenizer, load_tokenizer(directory, **code), section.teacher)
    started = time.perf_counter()
    model = load_model(directory, **context.loading)
    student = open_checkpoint(context.inputs["model"], **code).skeleton().config
    options: dict[str, Any] = {
        "top_k": section.top_k,
        "vocab_size": student.get_text_config().vocab_size,
        "progress": context.progress,
    }
    items, digest, texts, tokens, seen = None, "", None, None, 0
    if section.item_weight:
        examples = read_items(context.inputs["items"], "train")
        items, digest = predict_items(model, examples, loss_on=context.data.loss_on, **options)
        seen += sum(len(example.token_ids) for example in examples)
    if section.text is not None:
        tokens = text_tokens(section, tokenizer, seed=recipe.seed)
        texts = predict_texts(model, tokens, **options)
        seen += tokens.numel()
    name = context.keys[recipe.teacher_stage]
    Teacher(name, items, digest, texts, tokens).save(context.directory / TEACHER)
    return {"tokens": seen, "seconds": time.perf_counter() - started}
