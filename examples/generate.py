"""Use a merged model: verify its certificate, then generate with plain transformers.

python examples/generate.py runs/finetune/merged "Question: What is 3 plus 4?"
"""

import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from sqft.certificate import check_integrity, require_passed


def main(model_dir: str, prompt: str, max_new_tokens: int = 32) -> str:
    """Return the generated text."""
    require_passed(check_integrity(Path(model_dir)), Path(model_dir))
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    batch = tokenizer(prompt, return_tensors="pt")
    tokens = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    text = str(tokenizer.decode(tokens[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    print(text)
    return text


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
