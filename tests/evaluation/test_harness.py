"""lm-evaluation-harness on local tasks, without a network."""

import json
from pathlib import Path
from typing import Any

import pytest

from sqft.errors import DataError
from sqft.evaluation import evaluate_tasks

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


def test_a_local_task(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    data = tmp_path / "items.jsonl"
    rows = [{"question": f"what is {n}?", "choices": ["yes", "no"], "label": n % 2} for n in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "local_choice.yaml"
    task.write_text(TASK.format(data=data, cache=tmp_path / "cache"))
    results = evaluate_tasks(model, tiny_tokenizer, [str(task)], max_items=4)
    assert list(results) == ["local_choice"]
    assert 0.0 <= results["local_choice"]["acc,none"] <= 1.0
    assert results["local_choice"]["num_items"] == 4
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
