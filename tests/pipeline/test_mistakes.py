"""A hundred mistakes in recipes and commands: each is one line that says what to write in its place."""

from pathlib import Path
from typing import Any

import pytest

from sqft.cli import run_command_line
from sqft.errors import RecipeError
from sqft.pipeline import parse_recipe

RECIPE: dict[str, Any] = {
    "model": "m",
    "data": {"train": "d.jsonl"},
    "sparsify": {},
    "quantize": {},
    "adapters": {"ranks": [16, 8]},
    "train": {},
    "search": {},
    "evaluate": {},
    "export": {"formats": ["gguf"]},
}
# Overrides, several of them with | between, and what the line about them says.
MISTAKES = {
    "modle=m": "modle: unknown key (did you mean model?)",
    "model=3": "model: takes a section with keys such as",
    "model={}": "model.source: is required; write it",
    "model.sorce=x": "model.sorce: unknown key (did you mean source?)",
    "model.storage_dtype=fp16": "model.storage_dtype: must be 'auto'",
    "seed=-1": "seed: must be greater than or equal to 0",
    "seed=x": "seed: takes a whole number",
    "seed=1.5": "seed: takes a whole number",
    "name=a b": "name: takes letters, digits, '.', '_', '-' and one slash at most",
    "name=stages": "name: 'stages' is a folder of the workspace's own",
    "name=../x": "name: takes letters, digits, '.', '_', '-' and one slash at most",
    "name=": "name: takes a text",
    "name=a/b/c": "name: takes letters, digits, '.', '_', '-' and one slash at most",
    "data=x.jsonl": "data: takes a section with keys such as",
    "data={}": "data.train: is required; write it",
    "data.tran=x": "data.tran: unknown key (did you mean train?)",
    "data.form=chatml": "data.form: must be 'auto'",
    "data.prompt={q}|data.form=messages": "leave one of them out",
    "data.template=llama3": "data.template: must be 'plain'",
    "data.template=plain|data.form=messages": "leave template out",
    "data.loss_on=completion": "data.loss_on: must be 'answer'",
    "data.sequence_length=0": "data.sequence_length: must be greater than 0",
    "data.max_length=512": "data.max_length: unknown key (did you mean sequence_length?)",
    "data.max_seq_length=512": "data.max_seq_length: unknown key (did you mean sequence_length?)",
    "data.seq_len=3": "data.seq_len: unknown key (did you mean sequence_length?)",
    "data.too_long=truncate": "data.too_long: must be 'drop'",
    "data.search_items=0": "data.search_items: must be greater than 0",
    "data.test_items=-1": "data.test_items: must be greater than 0",
    "data.train_items=x": "data.train_items: takes a whole number",
    "data.form=template": "data: form template needs prompt and answer",
    "data.form=text|data.template=chat": "data: texts have no template; leave it out",
    "data.train=[]": "data.train: the list is empty; name a file",
    "data.train=[5]": "data.train.0: takes a text (given 5)",
    "data.train={hub: 5}": "data.train.hub: takes a text (given 5)",
    "train.steps[0]=3": "train.steps[0]: unknown key",
    "data.split=test": "data.split: unknown key (did you mean train?)",
    "data.batch_size=3": "data.batch_size: unknown key (did you mean train.batch_size?)",
    "calibration.num_samples=0": "calibration.num_samples: must be greater than 0",
    "calibration.samples=3": "calibration.samples: unknown key (did you mean num_samples?)",
    "calibration.sequence_length=-4": "calibration.sequence_length: must be greater than 0",
    "calibration.dataset=c4": "calibration.dataset: unknown key (did you mean source?)",
    "sparsify.sparsity=50": "sparsify.sparsity: is a fraction; for 50 % write 0.5",
    "sparsify.sparsity=1.5": "sparsify.sparsity: is a fraction; for 1.5 % write 0.015",
    "sparsify.sparsity=1.0": "sparsify.sparsity: must be less than 1",
    "sparsify.sparsty=0.5": "sparsify.sparsty: unknown key (did you mean sparsity?)",
    "sparsify.method=wnda": "sparsify.method: must be 'wanda'",
    "sparsify.pattern=4:2": "M, for instance '2:4', or 'N:M window B', for instance '16:32 window 2'",
    "sparsify.pattern=half": "M, for instance '2:4', or 'N:M window B', for instance '16:32 window 2'",
    "sparsify.pattern=2:4|sparsify.sparsity=0.5": "remove it",
    "sparsify.target=gpu": "sparsify.target: must be 'cpu'",
    "sparsify.ratio=0.5": "sparsify.ratio: unknown key (did you mean sparsity?)",
    "sparsify.budget=owl|sparsify.pattern=2:4": "leave budget at uniform",
    "sparsify.swaps=-1": "sparsify.swaps: must be greater than or equal to 0",
    "sparsify.damping=0": "sparsify.damping: must be greater than 0",
    "sparsify.target_modules=(": "names go into a list",
    "quantize.bits=5": "quantize.bits: must be 2, 3, 4 or 8",
    "quantize.bits=16": "quantize.bits: must be 2, 3, 4 or 8",
    "quantize.group_size=0": "quantize.group_size: write a positive number, or -1 for one group a row",
    "quantize.groupsize=64": "quantize.groupsize: unknown key (did you mean group_size?)",
    "quantize.method=awq": "quantize.method: must be 'gptq'",
    "quantize.symmetric=maybe": "quantize.symmetric: takes true or false",
    "quantize.target=q4_0": "quantize.target: must be 'gguf-q4_0'",
    "quantize.target=gguf-q4_0|quantize.bits=8": "leave it out or take another target",
    "quantize.target=gguf-q4_1|quantize.symmetric=true": "leave it out or take another target",
    "quantize.target=gguf-q4_0|quantize.group_size=48": "that is a multiple of 32, as 32 or 64",
    "quantize.scale_bits=2": "quantize.scale_bits: must be greater than or equal to 4",
    "quantize.method=rtn|quantize.descent=2": "remove it",
    "quantize.method=joint": "quantize.method: joint prunes by itself; remove the sparsify section",
    "quantize.sparsity=0.5": "remove it",
    "quantize.scale_fit=true": "remove it",
    "quantize=4": "quantize: takes a section with keys such as",
    "adapters.method=qlora": "adapters.method: must be 'lora'",
    "adapters.method=lora|adapters.gradient=lowrank": "the gradient of lora is exact",
    "adapters.r=8": "adapters.r: unknown key (did you mean ranks?)",
    "adapters.rank=8": "adapters.rank: unknown key (did you mean ranks?)",
    "adapters.lora_alpha=16": "adapters.lora_alpha: unknown key (did you mean alpha?)",
    "adapters.lora_dropout=0.1": "adapters.lora_dropout: unknown key (did you mean dropout?)",
    "adapters.ranks=8": "adapters.ranks: takes a list; write [8]",
    "adapters.ranks=[]": "adapters.ranks: the list is empty; write at least one",
    "adapters.ranks=[0]": "adapters.ranks: rank 0 alone trains nothing",
    "adapters.ranks=[-1, 4]": "adapters.ranks.0: must be greater than or equal to 0",
    "adapters.ranks=[0, 4]|search.method=minimal": "rank 0 everywhere",
    "adapters.ranks=[8.5]": "adapters.ranks.0: takes a whole number",
    "adapters.alpha=0": "adapters.alpha: must be greater than 0",
    "adapters.dropout=1.0": "adapters.dropout: must be less than 1",
    "adapters.dropout=-0.1": "adapters.dropout: must be greater than or equal to 0",
    "adapters.dropout_kind=row": "adapters.dropout_kind: must be 'column'",
    "adapters.kernels=cuda": "adapters.kernels: must be 'auto'",
    "adapters.target_modules=[": "names go into a list",
    "adapters.exclude_modules=[q_proj]": "unknown key (did you mean skip_modules?)",
    "adapters.method=sparse_peft": "remove the quantize section or use qa_sparse_peft",
    "adapters.method=scales": "remove it",
    "adapters.train_scales=true|adapters.method=lora": "use method scales or qa_sparse_peft",
    "adapters.base_precision=int4": "adapters.base_precision: must be 'latent'",
    "adapters=null": "train: needs an adapters section, or goes",
    "adapters.ranks=[8]|search.method=hill_climb": "give adapters.ranks more",
    "train.lr=1e-4": "train.lr: unknown key (did you mean learning_rate?)",
    "train.learning_rate=0": "train.learning_rate: must be greater than 0",
    "train.learning_rate=-1": "train.learning_rate: must be greater than 0",
    "train.learning_rate=1e-4x": "train.learning_rate: takes a number",
    "train.batch_size=0": "train.batch_size: must be greater than 0",
    "train.per_device_train_batch_size=4": "unknown key (did you mean batch_size?)",
    "train.num_train_epochs=3": "train.num_train_epochs: unknown key (did you mean epochs?)",
    "train.epochs=0": "train.epochs: must be greater than 0",
    "train.max_steps=0": "train.max_steps: must be greater than 0",
    "train.steps=10": "train.steps: unknown key (did you mean max_steps?)",
    "train.warmup_ratio=0.1": "train.warmup_ratio: unknown key (did you mean warmup_steps?)",
    "train.weight_decay=0.1": "goes under train.arguments, see sqft schema",
    "train.optim=adamw": "transformers.TrainingArguments goes under train.arguments, see sqft schema",
    "train.schedule=cosine_with_restarts": "train.schedule: must be 'linear'",
    "train.early_stopping=3|train.eval_steps=0": "set eval_steps above 0",
    "train.keep=first": "train.keep: must be 'last'",
    "train.bf16=true": "of transformers.TrainingArguments goes under train.arguments, see sqft schema",
    "train.gradient_checkpointing=yes please": "train.gradient_checkpointing: takes true or false",
    "train.save_steps=10": "train.save_steps: unknown key (did you mean checkpoint_steps?)",
    "train.report_to=wandb": "goes under train.arguments, see sqft schema",
    "train.eval_strategy=steps": "train.eval_strategy: unknown key (did you mean eval_steps?)",
    "train.batch_size=[4,8]": "for a run with each of several, use sqft sweep",
    "train.arguments=x": "train.arguments: takes keys and values: {key: value}",
    "train.max_length=512": "train.max_length: unknown key (did you mean data.sequence_length?)",
    "search.method=bayes": "search.method: must be 'median'",
    "search.trials=10": "search.trials: unknown key (did you mean num_trials?)",
    "search.num_trials=0": "search.num_trials: must be greater than 0",
    "evaluate.models=[merge]": "evaluate.models.0: must be 'base'",
    "evaluate.models=[dense]": "evaluate.models.0: must be 'base'",
    "evaluate.sequence_length=1": "evaluate.sequence_length: must be greater than or equal to 2",
    "evaluate.perplexity_tokens=1": "evaluate.perplexity_tokens: must be greater than or equal to 2",
    'name="\\ud800"': "name",
    'data.prompt="{question} \\ud800"': "prompt holds '\\ud800', which is not a character",
    "evaluate.batch_size=0": "evaluate.batch_size: must be greater than 0",
    "evaluate.task=[arc_easy]": "evaluate.task: unknown key (did you mean tasks?)",
    "evaluate.tasks=arc_easy": "evaluate.tasks: takes a list; write [arc_easy]",
    "export.formats=[ggml]": "export.formats.0: must be 'compressed-tensors'",
    "export.formats=gguf": "export.formats: takes a list; write [gguf]",
    "export.format=[gguf]": "export.format: unknown key (did you mean formats?)",
    "export=gguf": "export: takes a section with keys such as",
    "export.formats=[]": "export.formats: the list is empty; write at least one",
    "runtime.device=gpu": "runtime: device is auto, cpu, cuda or cuda:N",
    "runtime.device=cuda:x": "runtime: device is auto, cpu, cuda or cuda:N",
    "runtime.threads=0": "runtime.threads: must be greater than 0",
    "runtime.workspce=x": "runtime.workspce: unknown key (did you mean workspace?)",
    "runtime.log_level=loud": "runtime.log_level: must be 'debug'",
    "runtime.output=x": "runtime.output: unknown key; there are",
    "sparsify=null|quantize=null|adapters=null": "train: needs an adapters section, or goes",
    "tune.rank=0": "tune.rank: must be greater than 0",
    "prune={}": "prune: unknown key (did you mean sparsify?)",
    "lora={}": "lora: unknown key (did you mean adapters?)",
    "training={}": "training: unknown key (did you mean train?)",
    "training_args={}": "training_args: unknown key (did you mean train?)",
    "dataset=x": "dataset: unknown key (did you mean data?)",
    "output_dir=x": "output_dir: unknown key (did you mean runtime.workspace?)",
    "push_to_hub=true": "push_to_hub: unknown key; there are",
}
COMMANDS = {
    "rnu recipe.yaml": "Did you mean 'run'?",
    "run": "Missing argument 'RECIPE'",
    "run none.yaml": "there is no recipe none.yaml",
    "run recipe.yml": "there is no recipe recipe.yml (did you mean recipe.yaml?)",
    "plan recipe.yaml --jsn": "no such option: --jsn",
    "plan recipe.yaml sparsity": "is not an override; write section.key=value",
    "plan recipe.yaml =3": "is not an override; write section.key=value",
    "plan recipe.yaml data.train.x=3": "is a value, not a section",
    "plan empty.yaml": "holds no recipe; write at least",
    "plan list.yaml": "holds no recipe; write at least",
    "plan broken.yaml": "is not valid YAML",
    "plan twice.yaml": "is given twice",
    "plan sweep.yaml": "use sqft sweep",
}


@pytest.mark.parametrize("overrides", MISTAKES)
def test_a_wrong_recipe_is_one_line_with_the_remedy(overrides: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(RECIPE, overrides.split("|"))
    message = str(caught.value)
    assert message.startswith("recipe: ")
    assert MISTAKES[overrides] in message
    assert "\n" not in message
    assert not any(words in message for words in ("nput should", "instance of", "validation"))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_wrong_command_is_one_line_with_the_remedy(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "recipe": "model: m\ndata: {train: d.jsonl}\n",
        "empty": "",
        "list": "- model",
        "broken": "model: [",
        "twice": "model: a\nmodel: b\n",
        "sweep": "model: m\nsweep: {seed: [0, 1]}\n",
    }
    for name, text in contents.items():
        Path(f"{name}.yaml").write_text(text)
    assert run_command_line(command.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sqft: ")
    assert COMMANDS[command].lower() in line.lower()


def test_there_are_a_hundred() -> None:
    assert len(MISTAKES) + len(COMMANDS) >= 100
