"""Measuring a model: loss and accuracy on held-out items, perplexity, and lm-evaluation-harness."""

from typing import TYPE_CHECKING

from sqft.deferred import deferred_names

if TYPE_CHECKING:
    from sqft.evaluation.accuracy import AccuracyResult, evaluate_accuracy
    from sqft.evaluation.general import general_path
    from sqft.evaluation.harness import evaluate_tasks
    from sqft.evaluation.items import evaluate_items
    from sqft.evaluation.loss import (
        LossResult,
        PerplexityResult,
        evaluate_general,
        evaluate_loss,
        evaluate_perplexity,
    )
    from sqft.evaluation.paired import Difference, compare_correct, paired_difference
    from sqft.evaluation.task_identity import task_content

__all__ = [
    "AccuracyResult",
    "Difference",
    "LossResult",
    "PerplexityResult",
    "compare_correct",
    "evaluate_accuracy",
    "evaluate_general",
    "evaluate_items",
    "evaluate_loss",
    "evaluate_perplexity",
    "evaluate_tasks",
    "general_path",
    "paired_difference",
    "task_content",
]

__getattr__ = deferred_names(__name__, __file__)
