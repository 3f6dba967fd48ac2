"""Drafting heads compute what their published layouts define, and an engine drafts what they say: token for token."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.models.transformer import attention_spec, forward_with_taps, logits
from engine.request import Request
from engine.runner import Launched
from engine.slots import empty_tables
from engine.speculation import heads
from engine.speculation.checkpoint import open_draft
from engine.speculation.rows import Rows
from engine.speculative_config import SpeculativeConfig
from engine.weights.load import load_params, open_checkpoint
from kernels.attention import BACKENDS, RaggedBatch
from sharding.axes import ALONE
from tests.engine.buckets import few_buckets
from tests.engine.speculation import folders
from tests.engine.speculation.layouts import Eagle3, Mtp, Target, Tensors, drafts

K, PAGE, TAPS, LENGTH = 3, 8, [1, 2, 4], 24
METHODS = ["eagle3", "eagle3, residual normed", "mtp"]


def published(folder: pathlib.Path, name: str) -> tuple[SpeculativeConfig, Target, Eagle3 | Mtp]:
    """-> how to speculate with the model and the head that are written to the folder, and both as their layouts say."""
    if name == "mtp":
        config, tensors = folders.deepseek()
        folders.write(folder, config, tensors)
        target = Target(config, tensors)
        return SpeculativeConfig("mtp", K, adaptive=False), target, Mtp(target)
    config, tensors = folders.LLAMA, folders.llama(folders.LLAMA)
    more = {"norm_before_residual": name != "eagle3", "eagle_config": {"eagle_aux_hidden_state_layer_ids": TAPS}}
    own, of_head = folders.eagle3(config, **more)
    folders.write(folder, config, tensors)
    folders.write(folder / "head", own, of_head)
    target = Target(config, tensors)
    return (
        SpeculativeConfig("eagle3", K, str(folder / "head"), adaptive=False),
        target,
        Eagle3(target, own, of_head, TAPS),
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_head_s_logits_are_those_of_its_layout(tmp_path: pathlib.Path, name: str):
    """Of the first draft, which reads the model's features, and of those behind, which read the head's own output."""
    spec, target, head = published(tmp_path, name)
    rng = np.random.default_rng(7)
    sequences = [rng.integers(0, target.config["vocab_size"], length).tolist() for length in (2, 21, 9)]
    of_drafts, chosen, of_model = computed(tmp_path, spec, sequences)
    for row, tokens in enumerate(sequences):
        assert np.abs(of_model[row] - target.logits(tokens[:-1])[-1]).max() < 1e-4
        made = iter([int(step[row]) for step in chosen])
        wanted = drafts(head, tokens, K, lambda _, made=made: next(made))[1]
        np.testing.assert_allclose([step[row] for step in of_drafts], wanted, rtol=0, atol=1e-4)


def computed(
    folder: pathlib.Path, spec: SpeculativeConfig, sequences: Sequence[Sequence[int]]
) -> tuple[list[np.ndarray], list[np.ndarray], np.ndarray]:
    """-> our own logits [K][rows, V] of K drafts behind each sequence, the likeliest tokens, which are the drafts, and
    the model's logits [rows, V] for each sequence's last token."""
    checkpoint, backend = open_checkpoint(folder), BACKENDS["xla"]
    model = checkpoint.config
    draft = open_draft(spec, model, checkpoint, dummy=False, kv_dtype="float32")
    drafter = draft.drafter
    assert drafter.model is not None and draft.load is not None
    params = load_params(checkpoint, "float32") | {"draft": draft.load("float32", 0)}
    R, pages, length = len(sequences), 4, 4 * PAGE
    cache = lambda config, i: backend.cache_spec(attention_spec(config, i), R * pages + 1, PAGE, "float32")
    zeros = lambda config: [
        jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), cache(config, i)) for i in range(len(config.layers))
    ]
    table = np.arange(1, R * pages + 1, dtype=np.int32).reshape(R, pages)
    tables = empty_tables(R, length, model.vocab_size)
    counts = np.array([len(tokens) - 1 for tokens in sequences])  # each one's last token was only sampled so far
    for row, tokens in enumerate(sequences):
        tables = tables.replace(tokens=tables.tokens.at[row, : len(tokens)].set(jnp.array(tokens, jnp.int32)))
    slots = np.repeat(np.arange(R, dtype=np.int32), counts)
    positions = np.concatenate([np.arange(n, dtype=np.int32) for n in counts])
    ends = np.cumsum(counts).astype(np.int32)
    batch = RaggedBatch(
        jnp.asarray(table), jnp.asarray(counts, jnp.int32), jnp.asarray(np.append(0, ends), jnp.int32), jnp.int32(R),
        jnp.int32(np.sum(counts == 1)), jnp.asarray(table[slots, positions // PAGE]), jnp.asarray(positions % PAGE),
    )  # fmt: skip
    tokens = jnp.asarray(np.concatenate([s[:-1] for s in sequences]), jnp.int32)

    @jax.jit
    def look(params: Any) -> Any:
        hidden, _, taps = forward_with_taps(
            model, backend, params, zeros(model), tokens, jnp.asarray(positions), batch, drafter.taps
        )
        outputs, caches = heads.observe(
            drafter, model, backend, params, zeros(drafter.model), jnp.zeros((R, model.hidden_size)), hidden, taps,
            tables.tokens, jnp.asarray(slots), jnp.asarray(positions), batch, jnp.arange(R), jnp.asarray(ends - 1),
            ALONE,
        )  # fmt: skip
        found, chosen = [], []

        def choose(logits: jax.Array, positions: jax.Array, tables: Any) -> jax.Array:
            found.append(logits)
            chosen.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
            return chosen[-1]

        lengths = jnp.asarray(counts + 1, jnp.int32)
        rows = Rows(jnp.arange(R, dtype=jnp.int32), lengths, jnp.full(R, length, jnp.int32), jnp.asarray(table))
        heads.propose(drafter, model, backend, PAGE, params, caches, rows, outputs, K, tables, choose, ALONE)
        return found, chosen, logits(model, params, hidden[ends - 1])

    return jax.tree.map(np.asarray, look(params))


@pytest.mark.parametrize(("name", "rows"), [("eagle3", 2), ("mtp", 1)])  # with one, half as many steps to compile
def test_an_engine_keeps_as_many_drafts_as_are_right_by_the_layout(
    tmp_path: pathlib.Path, name: str, rows: int, monkeypatch: pytest.MonkeyPatch
):
    """How many drafts each step kept follows from the finished answer. Answers may have two tokens, so that some are
    right even of a head of random weights."""
    spec, target, head = published(tmp_path, name)
    llm, steps = speculating(tmp_path, spec, rows), list[tuple[Request, int, int, int]]()
    collect = llm.core.runner.collect

    def recording(launched: Launched) -> list[list[int]]:
        tokens, runs = collect(launched), launched.output.runs
        if runs is not None:
            for row, count, drafted in zip(
                launched.plan.rows, runs.counts.tolist(), runs.drafted.tolist(), strict=False
            ):
                if count:  # the sequence had not ended before
                    steps.append((row.request, len(row.request.token_ids), count - 1, drafted))
        return tokens

    monkeypatch.setattr(llm.core.runner, "collect", recording)
    rng, known = np.random.default_rng(8), head.logits(np.ones((1, target.config["hidden_size"])))[0]
    prompts = [rng.integers(0, target.config["vocab_size"], length).tolist() for length in (1, 21, 9)]
    kept = [0] * (K + 1)
    for _ in range(4):
        allowed = rng.choice(np.flatnonzero(np.isfinite(known)), 2, replace=False).tolist()
        params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True, allowed_token_ids=allowed)
        llm.generate(prompts, params, use_tqdm=False)
        choose = lambda found, allowed=allowed: max(allowed, key=lambda token: found[token])
        for request, length, count, drafted in steps:
            made, _ = drafts(head, request.token_ids[:length], drafted, choose)
            right = [a == b for a, b in zip(made, request.token_ids[length:], strict=False)]
            assert count == [*right, False].index(False)
            kept[count] += 1
        steps.clear()
    assert min(kept) > 0, "of some steps no draft is right, of some all are, and of some not all"


@pytest.mark.parametrize("reads", ["the token", "the features"])
@pytest.mark.parametrize("method", ["eagle3", "mtp"])
def test_all_drafts_of_a_perfect_head_are_kept(tmp_path: pathlib.Path, method: str, reads: str):
    """It knows the one token that follows each, and reads either input: neither may be of a neighbouring position."""
    of_head = {"eagle3": perfect_eagle3, "mtp": perfect_mtp}[method](tmp_path, reads == "the features")
    llm = speculating(tmp_path, SpeculativeConfig(method, K, of_head), rows=1)
    params = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    prompts = [[5], [3, 4, 5, 6], list(range(CYCLE)), list(range(CYCLE - 1)), [7]]  # the fourth is in the third's pages
    for prompt, output in zip(prompts, llm.generate(prompts, params, use_tqdm=False), strict=True):
        assert output.outputs[0].token_ids == [(prompt[-1] + 1 + i) % CYCLE for i in range(LENGTH)]
        assert output.metrics.num_accepted_tokens == output.metrics.num_draft_tokens >= LENGTH // 2


CYCLE = 32  # tokens, each of which is followed by the next
ONE_HOT = np.eye(CYCLE, dtype=np.float32)
NEXT = np.roll(ONE_HOT, 1, axis=0)  # NEXT @ one_hot(x) is one_hot(x + 1), and as an output it tells the token behind x
CIRCLE: dict[str, Any] = folders.LLAMA | dict(
    hidden_size=CYCLE, vocab_size=CYCLE, num_attention_heads=1, num_key_value_heads=1, head_dim=2 * CYCLE
)


def circle(layers: int) -> Tensors:
    """-> a model that sees the last token alone: its layers add nothing to the embedding."""
    tensors = folders.llama(CIRCLE | dict(num_hidden_layers=layers))
    zeros = ("o_proj.weight", "down_proj.weight")
    tensors = {name: np.zeros_like(a) if name.endswith(zeros) else a for name, a in tensors.items()}
    tensors |= {"model.embed_tokens.weight": ONE_HOT, "lm_head.weight": NEXT}
    return tensors | {"model.norm.weight": np.ones(CYCLE, np.float32)}


def perfect_eagle3(folder: pathlib.Path, reads_features: bool) -> str:
    """-> the folder of a head whose attention finds its own position by what it reads there, and passes that on."""
    folders.write(folder, CIRCLE, circle(CIRCLE["num_hidden_layers"]))
    config, tensors = folders.eagle3(CIRCLE, CYCLE, norm_before_residual=True)
    nothing = np.zeros_like(ONE_HOT)
    half = lambda block: np.hstack([nothing, block] if reads_features else [block, nothing])
    in_half = lambda block: np.vstack([block, np.zeros_like(block)])  # each token has a pair of rope's dimensions
    tensors = {name: np.zeros_like(a) if a.ndim > 1 else np.ones_like(a) for name, a in tensors.items()}
    tensors |= {
        "fc.weight": np.hstack([nothing, nothing, ONE_HOT]),
        "midlayer.self_attn.q_proj.weight": in_half(half(4 * ONE_HOT)),
        "midlayer.self_attn.k_proj.weight": in_half(half(4 * ONE_HOT)),
        "midlayer.self_attn.v_proj.weight": in_half(half(NEXT if reads_features else ONE_HOT)),
        "midlayer.self_attn.o_proj.weight": np.hstack([8 * ONE_HOT, nothing]),
        "lm_head.weight": NEXT, "d2t": np.zeros(CYCLE, np.int64), "t2d": np.ones(CYCLE, bool),
    }  # fmt: skip
    folders.write(folder / "head", config, tensors)
    return str(folder / "head")


def perfect_mtp(folder: pathlib.Path, reads_features: bool) -> None:
    """Write a model with a head whose layer adds nothing to the fused input."""
    tensors, depth = circle(CIRCLE["num_hidden_layers"] + 1), CIRCLE["num_hidden_layers"]
    prefix, nothing, ones = f"model.layers.{depth}.", np.zeros_like(ONE_HOT), np.ones(CYCLE, np.float32)
    own = {
        "eh_proj.weight": np.hstack([nothing, NEXT] if reads_features else [ONE_HOT, nothing]),
        "shared_head.head.weight": NEXT, "embed_tokens.weight": ONE_HOT,
        **dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), ones),
    }  # fmt: skip
    folders.write(folder, CIRCLE, tensors | {prefix + name: tensor for name, tensor in own.items()})


def speculating(folder: pathlib.Path, spec: SpeculativeConfig, rows: int) -> LLM:
    config = {"method": spec.method, "num_speculative_tokens": K, "adaptive": False}
    if spec.model is not None:
        config["model"] = spec.model
    with few_buckets():
        return LLM(
            str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=64, max_num_seqs=rows,
            max_num_batched_tokens=16, speculative_config=config,
        )  # fmt: skip
