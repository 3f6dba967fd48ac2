"""Break each mechanism of the models on purpose, and see that a test notices.

    python scripts/mutate_models.py [WORD ...]      only the mutations whose name has one of the words

A mutation replaces one piece of source text in a copy of the packages and runs the tests that should fail. Prints a
table; the exit status is 1 if one survives, or if the tests fail without any.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
COPIED = ("engine", "kernels", "sharding", "tests", "pyproject.toml", "README.md")


class Mutation(NamedTuple):
    """`old`, which must be in the file exactly once, becomes `new`; then a test of `model` should fail."""

    mechanism: str
    file: str
    old: str
    new: str
    model: str
    tests: str = "test_families.py"


READ, ROPE, FAMILIES = "engine/models/read.py", "engine/models/rope.py", "engine/models/families.py"
TRANSFORMER, LAYERS = "engine/models/transformer.py", "engine/models/layers.py"
ASSEMBLE, GGUF = "engine/weights/assemble.py", "test_gguf_families.py"
MOE, MLA, MIXTURES = "engine/models/moe.py", "engine/models/mla.py", "engine/models/mixtures.py"
LAYOUTS = "engine/weights/mixture_layouts.py"
MUTATIONS = (
    Mutation("window: left out", TRANSFORMER, "window=layer.window", "window=None", "mistral"),
    Mutation("window: one too long", READ, "window=window if slides[i]", "window=window + 1 if slides[i]", "mistral"),
    Mutation("window: on every layer", READ, "window if slides[i] else None", "window", "gemma2"),
    Mutation("rope: on layers without", READ, "if rotates[i] else None", "", "smollm3"),
    Mutation("rope: one for two kinds", READ, "nested(layer_type) if", "nested(LAYER_TYPES[0]) if", "gemma3"),
    Mutation("rope: on a part of a head", ROPE, "turned, x[..., 2", "turned, 0 * x[..., 2", "phi3"),
    Mutation("rope scaling: linear", ROPE, "spec.dim) / spec.factor", "spec.dim)", "biased"),
    Mutation("rope scaling: llama3", ROPE, '"llama3": _llama3', '"llama3": _default', "llama3"),
    Mutation("rope scaling: llama3, between", ROPE, "keep * plain", "(keep > 0) * plain", "llama3", "test_rope.py"),
    Mutation("rope scaling: yarn", ROPE, '"yarn": _yarn', '"yarn": _linear', "qwen3"),
    Mutation("rope scaling: yarn's truncation", ROPE, "if spec.truncate:", "if True:", "yarn", "test_rope.py"),
    Mutation("rope scaling: yarn's mscale", READ, "scale and all_dim", "False", "yarn", "test_rope.py"),
    Mutation("rope scaling: dynamic", ROPE, '"dynamic": _dynamic', '"dynamic": _default', "mistral"),
    Mutation("rope scaling: dynamic's length", READ, "int(longest * factor)", "longest + 128", "mistral"),
    Mutation("rope scaling: longrope's long", ROPE, "long_factors if", "short_factors if", "phi3"),
    Mutation("rope scaling: longrope's short", ROPE, "else spec.short", "else spec.long", "phi3"),
    Mutation("rope scaling: attention factor", ROPE, "(spec.attention_factor)", "(1)", "qwen3"),
    Mutation("qk norm: of heads", TRANSFORMER, "if config.qk_norm:", "if False:", "qwen3"),
    Mutation("qk norm: of the width", LAYERS, "tuple(range(-weight.ndim, 0))", "-1", "olmo2"),
    Mutation("norm offset", FAMILIES, "norm_offset=1.0", "norm_offset=0.0", "gemma2"),
    Mutation("norm offset: GGUF", ASSEMBLE, "if style == HF and", "if", "gemma2", GGUF),
    Mutation("norms: before", TRANSFORMER, 'norm("attn_norm", x)', "x", "qwen2"),
    Mutation("norms: after attention", TRANSFORMER, 'norm("attn_post_norm", h)', "h", "olmo2"),
    Mutation("norms: after the MLP", TRANSFORMER, 'norm("mlp_post_norm"', 'norm(""', "olmo2"),
    Mutation("soft cap: attention", READ, 'get("attn_logit_softcapping", float, None)', "None", "gemma2"),
    Mutation("soft cap: logits", READ, 'get("final_logit_softcapping", float, None)', "None", "gemma2"),
    Mutation("attention scale", TRANSFORMER, "config.attention_scale or ", "", "gemma2"),
    Mutation("embedding scale", TRANSFORMER, "if config.embedding_scale != 1:", "if False:", "gemma2"),
    Mutation("activation", READ, 'get("hidden_activation", str, None) or ', "", "gemma2"),
    Mutation("bias: q, k and v", TRANSFORMER, 'p["qkv"], p.get("qkv_bias")', 'p["qkv"]', "qwen2"),
    Mutation("bias: attention's output", TRANSFORMER, 'p.get("out_bias")', "None", "biased"),
    Mutation("bias: gate and up", TRANSFORMER, 'p.get("gate_up_bias")', "None", "biased"),
    Mutation("bias: down", TRANSFORMER, 'p.get("down_bias")', "None", "biased"),
    Mutation("fused weights: rows", ASSEMBLE, "rows[part.tensor] += count", "pass", "phi3"),
    Mutation("rope pairs: GGUF", ASSEMBLE, 'if paired and part != "v":', "if False:", "llama3", GGUF),
    Mutation("rope factors: GGUF", READ, "load(name).tolist()", "[1.0] * len(load(name))", "llama3", GGUF),
    Mutation("sinks", TRANSFORMER, 'p.get("sinks")', "None", "oss"),
    Mutation("router: renormalisation", MOE, "if spec.renormalize:", "if False:", "mixtral"),
    Mutation("router: no renormalisation", MOE, "if spec.renormalize:", "if True:", "v2"),
    Mutation("router: scale", MOE, "weights * spec.scale", "weights", "v2"),
    Mutation("router: bias", MOE, "if spec.router_bias:", "if False:", "oss"),
    Mutation("router: sigmoid", MOE, 'if spec.scoring == "softmax"', "if True", "v3"),
    Mutation("router: bias of the choice", MOE, "if choice_bias is None else", "if True else", "v3"),
    Mutation("router: bias beyond the choice", MOE, "along_axis(scores,", "along_axis(ranked,", "v3"),
    Mutation("router: groups", MOE, "if spec.num_groups > 1:", "if False:", "v2"),
    Mutation("router: a group's best", MIXTURES, "group_score_top=2 if", "group_score_top=1 if", "v3"),
    Mutation("experts: shared", MOE, "if spec.shared_size:", "if False:", "v2"),
    Mutation("experts: bias of gate and up", MOE, 'p["experts_gate_up_bias"].at', "0 * y.at", "oss"),
    Mutation("experts: bias of down", MOE, 'p["experts_down_bias"].at', "0 * y.at", "oss"),
    Mutation("experts: gate's clamp", MOE, "jnp.minimum(gate, spec.clamp)", "gate", "oss"),
    Mutation("experts: up's clamp", MOE, "jnp.clip(up, -spec.clamp, spec.clamp)", "up", "oss"),
    Mutation("experts: up's offset", MOE, "(up + 1)", "up", "oss"),
    Mutation("experts: padding", MOE, "valid[:, None], experts", "True, experts", "padding", "test_moe.py"),
    Mutation("experts: gate and up in turn", LAYOUTS, "D, F, 2), (0, 1, 3, 2)", "D, 2, F), (0, 1, 2, 3)", "oss"),
    Mutation("latent: scale", READ, "yarn_attention_factor(stretch, all_dim) ** 2", "1", "v2"),
    Mutation("latent: norm", MLA, 'rms_norm(kv[:, : spec.kv_rank], p["kv_a_norm"], eps)', "kv[:, :16]", "v2"),
    Mutation("latent: norm of queries", MLA, 'rms_norm(x @ p["q_a"], p["q_a_norm"], eps)', 'x @ p["q_a"]', "v3"),
    Mutation("latent: rope of queries", LAYOUTS, "(3, 0, 2, 1), (D, N, rope)", "(3, 0, 1, 2), (D, N, rope)", "v2"),
    Mutation("latent: rope of the key", LAYOUTS, "(2, 1, 0), (D, rope)", "(2, 0, 1), (D, rope)", "v2"),
    Mutation("latent: GGUF's scale", READ, "10 * log_multiplier", "log_multiplier", "v2", GGUF),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    words = parser.parse_args().words
    chosen = [m for m in MUTATIONS if not words or any(word in m.mechanism for word in words)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            shutil.copytree(source, copy / name) if source.is_dir() else shutil.copy(source, copy / name)
        for tests in dict.fromkeys(m.tests for m in chosen):
            if failed := failing_test(copy, tests, " or ".join({m.model for m in chosen if m.tests == tests})):
                print(f"without any mutation: {failed}")
                return 1
        survivors = [m.mechanism for m in chosen if not is_noticed(copy, m)]
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} mutations were noticed")
    return 1 if survivors else 0


def is_noticed(copy: Path, mutation: Mutation) -> bool:
    """-> whether a test's assertion fails with the mutation in place; prints the table's row."""
    file = copy / mutation.file
    text = file.read_text()
    if (times := text.count(mutation.old)) != 1:
        raise ValueError(f"{mutation.mechanism}: {mutation.old!r} is in {mutation.file} {times} times")
    file.write_text(text.replace(mutation.old, mutation.new))
    failed = failing_test(copy, mutation.tests, mutation.model)
    file.write_text(text)
    noticed = failed.endswith((": AssertionError", ": assert"))  # and no mutation that crashes
    print(f"{mutation.mechanism:34} {'' if noticed else 'SURVIVED '}{failed}", flush=True)
    return noticed


def failing_test(copy: Path, tests: str, model: str) -> str:
    """-> the first test that fails, and the error's name; nothing if all pass. Errors: ValueError if none ran."""
    command = [sys.executable, "-m", "pytest", "-qx", "--tb=line", "-p", "no:cacheprovider", "-k", model]
    command.append(f"tests/engine/models/{tests}")
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    if run.returncode == 0:
        return ""
    test = re.search(r"^FAILED .*/(\S+)::(\S+)", run.stdout, re.MULTILINE)
    error = re.search(r"^E +(\w+)", run.stdout, re.MULTILINE)
    if test is None or error is None:
        raise ValueError(f"no test ran: {' '.join(command)}\n{run.stdout}{run.stderr}")
    return f"{test[1]} {test[2]}: {error[1].replace('assert', 'AssertionError')}"


if __name__ == "__main__":
    sys.exit(main())
