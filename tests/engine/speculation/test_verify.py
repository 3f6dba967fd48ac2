"""Verification: what a step keeps of its drafts, and that chance is none the worse for it."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import chisquare

from engine.models.config import LayerSpec, ModelConfig, RopeSpec
from engine.models.narrow_placement import random_narrow
from engine.models.placement import whole
from engine.models.transformer import attention_spec
from engine.sampler import ACTIVE
from engine.slots import empty_tables
from engine.speculation.drafter import Drafter
from engine.speculation.step import speculating_step
from engine.speculation.verify import forced, num_kept
from engine.speculative_config import SpeculativeConfig
from engine.step import DeviceState, StepOutput
from engine.step_input import SLOT_FIELDS, StepShape, flat_size, unpack
from kernels.attention import BACKENDS

VOCAB, ROWS, K, PAGE, FIRST = 24, 500, 2, 8, 3
DRAWS = 200_000
TEMPERATURE, TOP_P, TOP_K, MIN_P = 1.3, 0.9, 12, 0.03
MODEL = ModelConfig("llama", VOCAB, 32, 48, 4, 2, 8, PAGE, (LayerSpec(RopeSpec(8)),) * 2)


def test_drafts_are_kept_up_to_the_first_that_is_wrong():
    sampled = jnp.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [9, 2, 3], [1, 9, 3], [-1, 2, 3]], jnp.int32)
    drafts = jnp.array([[1, 2], [1, 2], [1, 2], [1, 2], [1, 2], [0, 2]], jnp.int32)
    count = jnp.array([2, 1, 0, 2, 2, 2], jnp.int32)
    assert num_kept(sampled, drafts, count).tolist() == [2, 1, 0, 0, 1, 0]


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 1.0])
def test_a_forced_acceptance_is_that_share_of_all_drafts(share: float):
    sampled, drafts = jnp.zeros((20_000, 5), jnp.int32), jnp.ones((20_000, 4), jnp.int32)
    lengths = jnp.arange(20_000, dtype=jnp.int32)
    kept = num_kept(forced(sampled, drafts, lengths, share), drafts, jnp.full(20_000, 4, jnp.int32))
    assert abs(float(kept.mean()) / 4 - share) < 0.01


@pytest.fixture(scope="module")
def draw():
    """-> a function: drafts [K] -> what many requests got behind one token, [draws, K + 1], -1 where nothing."""
    params, backend = random_narrow(MODEL, "float32", 1, whole(MODEL), {}), BACKENDS["xla"]
    params["lm_head"] = params["lm_head"] * 1.4  # far from uniform
    shape = StepShape(ROWS, ROWS * (K + 1), drafts=K, follows=True)
    drafter = Drafter(SpeculativeConfig("suffix", K))
    run = jax.jit(partial(speculating_step, drafter, MODEL, backend, PAGE, shape))
    cache = backend.cache_spec(attention_spec(MODEL, 0), ROWS + 1, PAGE, "float32")
    caches = [jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), cache)] * len(MODEL.layers)
    tables = empty_tables(ROWS, PAGE, VOCAB)
    tables = tables.replace(tokens=tables.tokens.at[:, 0].set(FIRST))
    pages = jnp.arange(1, ROWS + 1, dtype=jnp.int32)[:, None]
    state = DeviceState(caches, pages, tables, jnp.ones(ROWS, jnp.int32))

    def flat_of(drafts: list[int], seeds: np.ndarray) -> np.ndarray:
        flat = np.zeros(flat_size(shape), np.int32)
        part = unpack(flat, shape)
        part["cu_q_lens"][:] = np.arange(ROWS + 1) * (K + 1)
        part["row_of"][:] = np.repeat(np.arange(ROWS), K + 1)
        part["slots"][:] = np.arange(ROWS)
        part["row_flags"][:], part["limits"][:], part["new_page_at"][:] = ACTIVE, PAGE, 1
        part["given"][:], part["num_given"][:] = drafts, len(drafts)
        values = dict(temperature=TEMPERATURE, top_p=TOP_P, min_p=MIN_P, repetition_penalty=1.0)
        for name, value in values.items():
            part["constants"][SLOT_FIELDS.index(name)] = np.float32(value).view(np.int32)
        part["constants"][SLOT_FIELDS.index("top_k")] = TOP_K
        part["constants"][SLOT_FIELDS.index("prompt_len")] = 1
        part["constants"][SLOT_FIELDS.index("seed_low")] = seeds
        return flat

    def draws(drafts: list[int], count: int = DRAWS) -> np.ndarray:
        found = np.full((count, K + 1), -1)
        for start in range(0, count, ROWS):
            output: StepOutput
            _, output = run(params, state, flat_of(drafts, np.arange(start, start + ROWS)))
            assert output.runs is not None
            tokens, counts = np.asarray(output.sampled.token).reshape(ROWS, K + 1), np.asarray(output.runs.counts)
            kept = np.arange(K + 1)[None] < counts[:, None]
            found[start : start + ROWS] = np.where(kept, tokens, -1)
        return found

    return draws, params


def exact(params: dict, tokens: list[int]) -> np.ndarray:
    """-> the distribution of the token behind these, in float64, from its definition."""
    from tests.engine.speculation.dense import dense_logits

    logits = dense_logits(MODEL, params, tokens)[-1] / TEMPERATURE
    p = np.exp(logits - logits.max())
    p /= p.sum()
    p = np.where(p >= MIN_P * p.max(), p, 0)
    p = np.where(p >= np.sort(p)[-TOP_K], p, 0)
    order = np.argsort(-p)
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= TOP_P * p.sum()]] = 0
    return p / p.sum()


def probability(tokens: np.ndarray, p: np.ndarray) -> float:
    """-> how likely draws from p are as far from it as these, by Pearson's chi-square test."""
    counts = np.bincount(tokens, minlength=VOCAB)
    assert counts[p == 0].sum() == 0, "a token that was cut"
    return float(chisquare(counts[p > 0], p[p > 0] * len(tokens)).pvalue)


def test_tokens_have_the_distribution_that_they_have_without_drafts(draw):
    draws, params = draw
    first = exact(params, [FIRST])
    likely, other = np.argsort(-first)[:2].tolist()
    second = exact(params, [FIRST, likely])
    drafts = [likely, int(np.argsort(-second)[1])]
    found = draws(drafts)
    assert probability(found[:, 0], first) > 0.001
    behind = found[found[:, 0] == likely, 1]
    assert len(behind) > 10_000 and probability(behind, second) > 0.001
    last = found[(found[:, 1] == drafts[1]) & (found[:, 0] == likely), 2]
    assert len(last) > 2_000 and probability(last, exact(params, [FIRST, *drafts])) > 0.001
    assert (found[found[:, 0] == other, 1:] == -1).all(), "nothing comes behind a wrong draft"

    # Were the token of a rejected draft drawn from p, and not from what is left of it, this test would notice.
    again = np.random.default_rng(0).choice(VOCAB, len(found), p=first)
    wrong = np.where(found[:, 0] == likely, found[:, 0], again)
    assert probability(wrong, first) < 0.001


def test_what_was_drafted_changes_no_token(draw):
    draws, params = draw
    likely = int(np.argmax(exact(params, [FIRST])))
    found = [draws(drafts, 2 * ROWS) for drafts in ([likely, 1], [0, 1], [likely, likely])]
    assert (found[0][:, 0] == found[1][:, 0]).all() and (found[0][:, 0] == found[2][:, 0]).all()
    both = (found[0][:, 1] >= 0) & (found[2][:, 1] >= 0)
    assert both.sum() > 100 and (found[0][both, 1] == found[2][both, 1]).all()
