"""Make tests/data/tiny/*/embeddings.json: transformers' last hidden states of a few prompts, pooled, in float32.

    OTHER/python scripts/make_embedding_goldens.py qwen3 gemma3

needs torch and transformers, which are no dependencies of the project.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers

TINY = Path(__file__).parents[1] / "tests" / "data" / "tiny"
LENGTHS = (1, 5, 23, 70)


@torch.inference_mode()
def main() -> None:
    for name in sys.argv[1:]:
        model = transformers.AutoModel.from_pretrained(TINY / name, dtype=torch.float32).eval()
        torch.manual_seed(1)
        cases = []
        for length in LENGTHS:
            tokens = torch.randint(0, model.config.vocab_size, (1, length))
            hidden = model(tokens).last_hidden_state[0].double()
            pooled = {"last": hidden[-1], "mean": hidden.mean(0), "cls": hidden[0]}
            vectors = {kind: [round(x, 6) for x in vector.tolist()] for kind, vector in pooled.items()}
            cases.append({"prompt_token_ids": tokens[0].tolist(), **vectors})
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        text = json.dumps({"versions": versions, "cases": cases}, separators=(",", ":"))
        (TINY / name / "embeddings.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
