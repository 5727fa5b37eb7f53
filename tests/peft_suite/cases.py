"""The configurations that PEFT's tests are run with, in the place of those of PEFT's own methods."""

from typing import Any

from sqft.adapters import SqftConfig

__all__ = ["FILES", "TABLE"]

BOTH = {"target_modules": ["lin0", "lin1"], "alpha": 16.0, "ranks": [4]}
Case = tuple[str, str, type[SqftConfig], dict[str, Any]]


def _case(name: str, model_id: str, **settings: Any) -> Case:
    return f"{name} on {model_id}", model_id, SqftConfig, settings


# test_custom_models.py: PEFT's own small MLP.
CUSTOM = [
    _case("lora, one layer", "MLP", method="lora", target_modules="lin0"),
    _case("lora", "MLP", method="lora", **BOTH),
    _case("lora with a head", "MLP", method="lora", target_modules=["lin0"], modules_to_save=["lin1"]),
    _case("sparse", "MLP", method="sparse_peft", **BOTH),
    _case("sparse", "MLP sparse", method="sparse_peft", **BOTH),
    _case("sparse, lowrank", "MLP sparse", method="sparse_peft", gradient="lowrank", **BOTH),
    _case("sparse with a head", "MLP sparse", target_modules=["lin0"], modules_to_save=["lin1"]),
    _case("lora", "MLP int4", method="lora", **BOTH),
    _case("quantization-aware", "MLP int4", method="qa_sparse_peft", **BOTH),
    _case("quantization-aware, scales too", "MLP int4", method="qa_sparse_peft", train_scales=True, **BOTH),
    _case("scales", "MLP int4", method="scales", train_norms=False, target_modules=["lin0", "lin1"]),
]  # fmt: skip
LLAMA, QWEN = "trl-internal-testing/tiny-random-LlamaForCausalLM", "peft-internal-testing/tiny-dummy-qwen2"
OPT, GPTJ = (f"peft-internal-testing/tiny-random-{name}ForCausalLM" for name in ("OPT", "GPTJ"))
GEMMA = "hf-internal-testing/tiny-random-Gemma3ForCausalLM"
BERT, ROBERTA = (f"peft-internal-testing/tiny-random-{name}" for name in ("Bert", "Roberta"))
Pair = tuple[str, type[SqftConfig], dict[str, Any]]


def _pair(model_id: str, method: str, task: str, **settings: Any) -> Pair:
    return model_id, SqftConfig, {"task_type": task, "method": method, "ranks": [8], "alpha": 32.0} | settings


DECODERS = [
    *(_pair(model_id, "lora", "CAUSAL_LM") for model_id in (OPT, GPTJ, LLAMA, QWEN, GEMMA)),
    *(_pair(f"{model_id} sparse", "sparse_peft", "CAUSAL_LM") for model_id in (OPT, LLAMA, GEMMA)),
    *(_pair(f"{model_id} int4", "qa_sparse_peft", "CAUSAL_LM") for model_id in (LLAMA, QWEN)),
    _pair(f"{LLAMA} int4", "scales", "CAUSAL_LM"),
]
QUERY = ["query", "value"]


def _encoders(task: str, *models: str) -> list[Pair]:
    return [
        *(_pair(model_id, "lora", task, target_modules=QUERY) for model_id in models),
        *(_pair(f"{model_id} sparse", "sparse_peft", task, target_modules=QUERY) for model_id in models),
    ]


CLASSIFIERS = [
    *_encoders("SEQ_CLS", f"{BERT}ForSequenceClassification", f"{ROBERTA}ForSequenceClassification"),
    _pair("trl-internal-testing/tiny-LlamaForSequenceClassification-3.2", "lora", "SEQ_CLS"),
]
FEATURES = _encoders("FEATURE_EXTRACTION", f"{BERT}Model", f"{ROBERTA}Model")
WORDS = _encoders("TOKEN_CLS", f"{BERT}ForSequenceClassification")
ANSWERS = _encoders("QUESTION_ANS", f"{BERT}ForSequenceClassification")

CASE, PAIR = "test_name, model_id, config_cls, config_kwargs", "model_id, config_cls, config_kwargs"
# File of tests, and class where it matters → the names of the parameters, and their values.
TABLE: dict[tuple[str, str | None], tuple[str, list[Any]]] = {
    ("test_config", None): ("config_class, mandatory_kwargs", [(SqftConfig, {})]),
    ("test_custom_models", None): (CASE, CUSTOM),
    ("test_decoder_models", None): (PAIR, DECODERS),
    ("test_feature_extraction_models", None): (PAIR, FEATURES),
    ("test_seq_classifier", None): (PAIR, CLASSIFIERS),
    ("test_token_classification_qa", "TestTokenClassificationModels"): (PAIR, WORDS),
    ("test_token_classification_qa", "TestQuestionAnsweringModels"): (PAIR, ANSWERS),
}
FILES = sorted({f"{file}.py" for file, _ in TABLE})
