"""lm-evaluation-harness on local tasks, without a network."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sqft import untrusted
from sqft.errors import DataError
from sqft.evaluation import evaluate_tasks
from sqft.evaluation.harness import main_figure

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

TASK = """
task: local_choice
dataset_path: json
dataset_name: null
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {cache}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: label
metric_list: [{{metric: acc}}]
"""


def _likeliest(model: Any, tokenizer: Any, question: str, choices: list[str]) -> int:
    """The choice whose tokens after the question have the largest sum of log probabilities."""
    sums = []
    for choice in choices:
        ids = torch.tensor([tokenizer(f"{question} {choice}")["input_ids"]])
        start = len(tokenizer(question)["input_ids"])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0].log_softmax(-1)
        sums.append(sum(float(logits[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
    return max(range(len(choices)), key=sums.__getitem__)


def test_a_local_task(
    model: Any,
    tiny_tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "items.jsonl"
    rows: list[dict[str, Any]] = [
        {"question": f"what is {n}?", "choices": ["yes", "no"], "label": n % 2} for n in range(6)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "local_choice.yaml"
    task.write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)  # outside a repository
    results = evaluate_tasks(model, tiny_tokenizer, [str(task)], max_items=4)
    assert capfd.readouterr().err == ""  # no bars of the harness, and no complaint of git
    assert list(results) == ["local_choice"]
    asked = [(row["question"], row["choices"], row["label"]) for row in rows[:4]]
    right = [_likeliest(model, tiny_tokenizer, text, choices) == label for text, choices, label in asked]
    assert results["local_choice"]["acc,none"] == sum(right) / 4
    assert results["local_choice"]["num_items"] == 4
    assert main_figure(results["local_choice"]) == ("acc", results["local_choice"]["acc,none"])
    json.dumps(results)


@pytest.mark.parametrize(
    ("content", "message"), [(None, "does not exist"), ("a: b", "no 'task' name"), ("a: [", "not YAML")]
)
def test_bad_task_files(
    content: str | None, message: str, model: Any, tiny_tokenizer: Any, tmp_path: Path
) -> None:
    pytest.importorskip("lm_eval")
    path = tmp_path / "task.yaml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        evaluate_tasks(model, tiny_tokenizer, [str(path)])


ENDLESS = "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}"
PAYLOADS = {
    "function": "doc_to_text: !function evil.f",
    "function in an included file": "include: evil.inc",
    "template": "doc_to_text: \"{{ cycler.__init__.__globals__.os.system('touch MARK') }}\"",
    "endless template": f'doc_to_text: "{ENDLESS}"',
    "huge template": "doc_to_text: \"{{ 'a' * 99999999999 }}\"",
    "class": "class: evil.Task",
    "metric": "metric_list: [{metric: someone/metric}]",
    "hub metric": "metric_list: [{metric: acc, hf_evaluate: true}]",
    "data set": "dataset_path: someone/data",
    "address": "dataset_kwargs: {data_files: {test: 'https://example.org/a.jsonl'}}",
    "itself": "include: task.yaml",
    "prompt": "use_prompt: evil.yaml:*",
}


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_task_file_runs_no_code_and_fetches_nothing(
    payload: str, model: Any, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(untrusted, "RENDER_SECONDS", 0.2)
    mark = tmp_path / "mark"
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": "a", "choices": ["b", "c"], "label": 0}))
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(mark)!r}).touch()\nf = Task = str")
    (tmp_path / "evil.inc").write_text("doc_to_text: !function evil.f")
    task = tmp_path / "task.yaml"
    plain = TASK.format(data="items.jsonl", cache=tmp_path / "cache").strip().splitlines()
    key = PAYLOADS[payload].partition(":")[0]
    kept = [line for line in plain if line.partition(":")[0] != key]
    task.write_text("\n".join([*kept, PAYLOADS[payload].replace("MARK", str(mark))]))
    (tmp_path / "another.yaml").write_text(
        f"task: local_choice\n{PAYLOADS['function']}\n"
    )  # of the same name
    with pytest.raises(DataError) as raised:
        evaluate_tasks(model, tiny_tokenizer, [str(task)], max_items=1)
    assert not mark.exists()
    assert "\n" not in str(raised.value)


def test_a_trusted_task_file_may_name_code(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "items.jsonl"
    data.write_text(json.dumps({"question": "a", "choices": ["b", "c"], "label": 0}))
    (tmp_path / "own.py").write_text("def text(doc):\n    return 'asked: ' + doc['question']\n")
    task = tmp_path / "task.yaml"
    task.write_text(
        TASK.format(data=data, cache=tmp_path / "cache").replace('"{{question}}"', "!function own.text")
    )
    results = evaluate_tasks(model, tiny_tokenizer, [str(task)], trust_remote_code=True)
    assert results["local_choice"]["num_items"] == 1


def test_the_main_figure_is_the_first_metric() -> None:
    figures = {"sample_len": 64, "f1_stderr,none": "N/A", "f1,none": 0.25, "acc,none": 0.5, "num_items": 64}
    assert main_figure(figures) == ("f1", 0.25)
    assert main_figure({"exact_match,strict-match": 0.0}) == ("exact_match, strict-match", 0.0)
    with pytest.raises(DataError, match="no figure"):
        main_figure({"sample_len": 64, "num_items": 64})
