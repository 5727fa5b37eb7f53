"""Tasks of the harness by name, on files that lie here: invented records of the hub's schemas."""

import json
from collections.abc import Callable
from importlib.metadata import version
from math import exp, fsum, log
from pathlib import Path
from typing import Any

import pytest

from sqft.data import Example
from sqft.errors import DataError
from sqft.evaluation import evaluate_items, evaluate_tasks, task_content
from sqft.evaluation.definitions import find_definition
from sqft.evaluation.harness import main_figure
from sqft.evaluation.numbers import last_number, numbers_agree

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

CHOICES = {"text": ["a fox", "a dog", "the home", "a file"], "label": ["A", "B", "C", "D"]}
SCIENCE = {"choices": CHOICES, "answerKey": "B"}
PLAIN = {"question": "who runs home?", "choices": ["a fox", "a dog"], "label": 1}
# One record of each task as the hub has it, and where people keep another form, that one.
RECORDS: dict[str, list[dict[str, Any]]] = {
    "gsm8k": [{"question": "what is 3 plus 4?", "answer": "3+4=7\n#### 7"}],
    "boolq": [
        {"question": "is it quick", "passage": "the quick fox", "label": 1},
        {"question": "is it lazy", "passage": "the quick fox", "answer": False, "title": "fox"},
    ],
    "piqa": [{"goal": "run home", "sol1": "with a dog", "sol2": "with a file", "label": 0}, PLAIN],
    "hellaswag": [
        {
            "ctx_a": "the dog runs.",
            "ctx_b": "it",
            "activity_label": "Running",
            "endings": ["runs home", "is a file", "is fine", "answers"],
            "label": "0",
        }
    ],
    "winogrande": [
        {"sentence": "the fox met the dog, and the _ ran.", "option1": "fox", "option2": "dog", "answer": "1"}
    ],
    "arc_easy": [{"question": "who is lazy?", **SCIENCE}, PLAIN],
    "arc_challenge": [{"question": "who is lazy?", **SCIENCE}, PLAIN],
    "openbookqa": [{"question_stem": "who is lazy", **SCIENCE}, PLAIN],
    "mawps": [{"question": "what is 3 plus 4?", "answer": 7}],
    "svamp": [{"question": "what is 3 plus 4?", "answer": 7.0}],
}


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """A folder of data sets, test split only; GSM8K with something to learn from."""
    for name, records in RECORDS.items():
        folder = tmp_path / "data" / name
        folder.mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "test.jsonl").write_text(lines)
        if name == "gsm8k":
            (folder / "train.jsonl").write_text(lines * 6)
    return tmp_path / "data"


def test_every_task_of_the_paper_runs_on_local_files(model: Any, tiny_tokenizer: Any, data_dir: Path) -> None:
    results = evaluate_tasks(
        model, tiny_tokenizer, list(RECORDS), data_dir=data_dir, num_fewshot=0, samples=True
    )
    assert list(results) == list(RECORDS)
    for task, figures in results.items():
        assert figures["num_items"] == len(RECORDS[task]) == len(figures["items"]["ids"])
        metric, value = main_figure(figures)
        assert 0.0 <= value <= 1.0
        assert any("_stderr" in key for key in figures)
        name, _, kind = metric.partition(", ")
        per_item = figures["items"][f"{name},{kind or 'none'}"]
        assert sum(per_item) / len(per_item) == pytest.approx(value)
        assert figures["samples"]
    prompt = results["gsm8k"]["samples"][0]["arguments"][0][0]
    assert prompt == "Question: what is 3 plus 4?\nAnswer:"
    assert results["arc_easy"]["samples"][1]["arguments"][0][0] == "Question: who runs home?\nAnswer:"
    json.dumps({name: figures["items"] for name, figures in results.items()})


def test_the_mathematical_prompt_of_the_paper(model: Any, tiny_tokenizer: Any, data_dir: Path) -> None:
    tasks = ["math_gsm8k", "math_mawps", "math_svamp"]
    results = evaluate_tasks(model, tiny_tokenizer, tasks, data_dir=data_dir, max_items=1, samples=True)
    for task in tasks:
        prompt, settings = results[task]["samples"][0]["arguments"][0]
        assert "### Instruction:\nwhat is 3 plus 4?\n\n### Response:\n" in prompt
        assert settings["num_beams"] == 4
        assert results[task]["acc,none"] in (0.0, 1.0)


def test_solved_examples_need_a_training_file(model: Any, tiny_tokenizer: Any, data_dir: Path) -> None:
    results = evaluate_tasks(model, tiny_tokenizer, ["gsm8k"], data_dir=data_dir, samples=True)
    assert results["gsm8k"]["samples"][0]["arguments"][0][0].count("Question:") == 6
    (data_dir / "gsm8k" / "train.jsonl").unlink()
    with pytest.raises(DataError, match="shows the model 5 solved examples"):
        evaluate_tasks(model, tiny_tokenizer, ["gsm8k"], data_dir=data_dir)
    asked = evaluate_tasks(model, tiny_tokenizer, ["gsm8k"], data_dir=data_dir, num_fewshot=0)
    assert asked["gsm8k"]["data_set"] == "openai/gsm8k"


def test_our_scorer_and_the_harness_agree(model: Any, tiny_tokenizer: Any, tmp_path: Path) -> None:
    """On the same prompts and choices: log-probabilities, accuracy and the loss among the choices."""
    words = ["yes", "no never", "runs home", "a small file"]
    rows: list[Any] = [
        {"question": f"what is {n} plus {n}?", "choices": words, "label": n % 4} for n in range(24)
    ]
    path = tmp_path / "items.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = tmp_path / "same.yaml"
    task.write_text(
        f"task: same\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {path}}}, "
        f"cache_dir: {tmp_path / 'cache'}}}\ntest_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: choices\ndoc_to_target: label\n'
        "metric_list: [{metric: acc}, {metric: brier_score}]\n"
    )
    figures = evaluate_tasks(model, tiny_tokenizer, [str(task)], samples=True)["same"]
    examples = [
        Example(
            row["question"],
            words[row["label"]],
            tuple(tiny_tokenizer(row["question"])["input_ids"]),
            (),
            tuple(tuple(tiny_tokenizer(f" {word}")["input_ids"]) for word in words),
            row["label"],
        )
        for row in rows
    ]
    loss, accuracy = evaluate_items(model, examples, tiny_tokenizer, batch_size=5)
    assert accuracy is not None
    assert figures["acc,none"] == pytest.approx(accuracy.accuracy, abs=1e-6)
    assert [bool(right) for right in figures["items"]["acc,none"]] == accuracy.correct
    losses = []
    for sample in figures["samples"]:
        scores = [float(answer[0][0]) for answer in sample["resps"]]
        losses.append(log(fsum(map(exp, scores))) - scores[sample["target"]])
    assert fsum(losses) / len(losses) == pytest.approx(loss.loss, abs=1e-6)
    assert losses == pytest.approx(loss.sums, abs=1e-5)  # of one item, float32 rounds a sum of many logits


@pytest.mark.parametrize(
    ("name", "message"),
    [("arc_eazy", "no task arc_eazy; the nearest are .*arc_easy"), ("zzzzzz", "no task zzzzzz; see")],
)
def test_an_unknown_task(name: str, message: str, model: Any, tiny_tokenizer: Any) -> None:
    with pytest.raises(DataError, match=message):
        evaluate_tasks(model, tiny_tokenizer, [name])


def test_groups_and_tags_are_known_by_name() -> None:
    assert find_definition("mmlu") is None
    assert find_definition("ai2_arc") is None
    path = find_definition("arc_challenge")
    assert path is not None
    assert path.name == "arc_challenge.yaml"


def test_data_that_are_not_here(
    model: Any, tiny_tokenizer: Any, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (data_dir / "svamp" / "test.jsonl").unlink()
    with pytest.raises(DataError, match=r"data of task svamp are not here: .*svamp/test\.jsonl"):
        evaluate_tasks(model, tiny_tokenizer, ["svamp"], data_dir=data_dir)
    with pytest.raises(DataError, match=r"data of task mawps are not here; .*evaluate\.tasks_data"):
        evaluate_tasks(model, tiny_tokenizer, ["mawps"])
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data of arc_easy are not here.*evaluate\.tasks_data"):
        evaluate_tasks(model, tiny_tokenizer, ["arc_easy"])


def test_what_identifies_a_task_by_name(data_dir: Path) -> None:
    """Its definition, the code that this names, and its local files; of a group the harness's release."""
    (gsm8k,) = task_content(["gsm8k"], data_dir=data_dir)
    assert set(gsm8k["data"]) == {"test", "train"}
    (math,) = task_content(["math_gsm8k"], data_dir=data_dir)
    assert len(math["definition"]) == 2  # the prompt, and numbers.py
    assert task_content(["mmlu"]) == [{"group": "mmlu", "harness": version("lm-eval")}]
    (data_dir / "gsm8k" / "test.jsonl").write_text('{"question": "q", "answer": "#### 1"}\n')
    assert task_content(["gsm8k"], data_dir=data_dir) != [gsm8k]
    (data_dir / "gsm8k" / "test.jsonl").unlink()
    with pytest.raises(DataError, match="data of task gsm8k are not here"):
        task_content(["gsm8k"], data_dir=data_dir)


@pytest.mark.parametrize(
    ("task", "record"),
    [
        ("arc_easy", {"question": "who?", "choices": ["a", "b"], "label": 2}),
        ("openbookqa", {"question": "who?", "choices": "ab", "label": 0}),
        ("piqa", {"question": "who?", "choices": ["a", "b", "c"], "label": 0}),
        ("boolq", {"question": "is it", "passage": "it is"}),
        ("mawps", {"text": "3 + 4"}),
    ],
)
def test_records_that_do_not_fit(
    task: str, record: dict[str, Any], model: Any, tiny_tokenizer: Any, data_dir: Path
) -> None:
    (data_dir / task / "test.jsonl").write_text(json.dumps(record) + "\n")
    with pytest.raises(DataError, match=task):
        evaluate_tasks(model, tiny_tokenizer, [task], data_dir=data_dir)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 7", 7.0),
        ("1,234.5 dollars", 1234.5),
        ("3 - 10 = -7.", -7.0),
        ("1, 2", 2.0),
        ("none", None),
        ("", None),
        ("9" * 400, None),
    ],
)
def test_the_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numbers_agree_within_a_thousandth() -> None:
    assert numbers_agree("so it is 1.8333", 1.833333)
    assert numbers_agree("#### 18", "16 - 3\n#### 18")
    assert not numbers_agree("1.84", 1.833333)
    assert not numbers_agree("no idea", 4)


class Parrot:
    """A runtime that finds each token as likely as any, and always says the same."""

    max_length = 512

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def score(self, ids: Any, wanted: Any) -> list[float]:
        return [-1.0] * len(wanted)

    def greedy(self, ids: Any) -> Any:
        yield from self.ids


def test_a_model_that_another_program_runs(
    tiny_tokenizer: Any, data_dir: Path, make_items: Callable[..., list[Example]]
) -> None:
    says = [*tiny_tokenizer(" 3 plus 4 is 7")["input_ids"], tiny_tokenizer.eos_token_id]
    parrot = Parrot(says)
    results = evaluate_tasks(
        parrot, tiny_tokenizer, ["mawps", "gsm8k", "arc_easy"], data_dir=data_dir, num_fewshot=0
    )
    assert results["mawps"]["acc,none"] == 1.0
    assert results["gsm8k"]["exact_match,flexible-extract"] == 1.0
    assert results["arc_easy"]["num_items"] == 2
    with pytest.raises(DataError, match="only a model that transformers runs"):
        evaluate_tasks(parrot, tiny_tokenizer, ["math_mawps"], data_dir=data_dir)
    loss, accuracy = evaluate_items(Parrot(says), make_items(), tiny_tokenizer)
    assert accuracy is not None
    assert loss.loss == pytest.approx(1.0)
    assert accuracy.accuracy == 0.0
