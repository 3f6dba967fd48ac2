"""A list of prompts, answered all at once: what most scripts want.

python examples/offline_inference.py
"""

from engine import LLM, SamplingParams
from engine.weights.default_model import default_model

PROMPTS = ["The sea is", "A list of prime numbers: 2, 3, 5,", "Once upon a time,"]


def main() -> None:
    llm = LLM(model=str(default_model()), max_model_len=256, max_num_seqs=4, max_num_batched_tokens=64)
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=7, max_tokens=24)
    for output in llm.generate(PROMPTS, params):
        print(f"{output.prompt}|{output.outputs[0].text}")
    answer = llm.chat([{"role": "user", "content": "What is the capital of France?"}], SamplingParams(temperature=0))
    print(answer[0].outputs[0].text)


if __name__ == "__main__":
    main()
