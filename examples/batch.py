"""A batch file, written, answered and read: `python -m engine.batch` does the middle part.

python examples/batch.py
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from engine.weights.default_model import default_model

COUNTRIES = ["France", "Japan", "Egypt"]


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "requests.jsonl", Path(scratch) / "answers.jsonl"
        with source.open("w") as file:
            for country in COUNTRIES:
                question = {"role": "user", "content": f"What is the capital of {country}?"}
                body = {"messages": [question], "max_tokens": 16, "temperature": 0}
                request = {"custom_id": country, "method": "POST", "url": "/v1/chat/completions", "body": body}
                file.write(json.dumps(request) + "\n")
        settings = ["--max-model-len=256", "--max-num-seqs=4", "--max-num-batched-tokens=64"]
        files = ["-i", str(source), "-o", str(target), "--model", str(default_model())]
        subprocess.run([sys.executable, "-m", "engine.batch", *files, *settings], check=True)
        for row in map(json.loads, target.read_text().splitlines()):
            print(row["custom_id"], "->", row["response"]["body"]["choices"][0]["message"]["content"])


if __name__ == "__main__":
    main()
