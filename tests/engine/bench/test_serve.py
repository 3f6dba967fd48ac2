"""`bench serve` against a server with known delays, in virtual time: what is reported is what was."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from absl import flags

from engine.bench import serve
from engine.bench.load import Ramp, arrival_times
from engine.bench.serve import Run
from engine.command_line import parse
from tests.engine.bench import virtual_time
from tests.engine.bench.fake_openai import FakeOpenAI, delays

COUNT, TOKENS = 60, 9
PROMPTS = [[40 + 3 * i, 10 + i % 7, i, *range(i % 5)] for i in range(COUNT)]


def bench(tmp_path: Any, *arguments: str, trouble: str | None = None, prompts: Any = PROMPTS) -> tuple[list[Run], Any]:
    """-> the runs of `bench serve` with these arguments, and the bodies that the server saw."""
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(json.dumps({"prompt": prompt, "output_tokens": TOKENS}) for prompt in prompts))
    values, seen = flags.FlagValues(), []
    serve.define(values)
    given = ["--dataset-name=custom", f"--dataset-path={data}", f"--num-prompts={len(prompts)}", "--disable-tqdm"]
    parse(values, ["bench", *given, *arguments], serve.SEVERAL)
    runs = virtual_time.run(lambda: FakeOpenAI(seen, trouble), serve.bench(values, serve.read_settings(values)))
    return runs, seen


def truth(prompts: list[list[int]] = PROMPTS) -> dict[str, np.ndarray]:
    """-> milliseconds by metric, from the delays alone."""
    waits = 1000 * np.array([delays(prompt, TOKENS) for prompt in prompts])
    return {
        "ttft": waits[:, 0],
        "tpot": waits[:, 1:].mean(1),
        "itl": waits[:, 1:].ravel(),
        "e2el": waits.sum(1),
    }


@pytest.mark.parametrize("rate", ["inf", "20"])
def test_every_metric_is_within_2_percent_of_the_truth(tmp_path, rate):
    (run,), _ = bench(tmp_path, f"--request-rate={rate}", "--metric-percentiles=50,90,99")
    report, known = run.report, truth()
    for name, values in known.items():
        expected = {f"mean_{name}_ms": values.mean(), f"median_{name}_ms": np.median(values)}
        expected |= {f"std_{name}_ms": values.std()}
        expected |= {f"p{p}_{name}_ms": np.percentile(values, p) for p in (50, 90, 99)}
        for key, value in expected.items():
            assert report[key] == pytest.approx(value, rel=0.02), key
    sent = np.zeros(COUNT) if rate == "inf" else arrival_times(COUNT, 20, 1.0, np.random.default_rng(0))
    duration = (sent + known["e2el"] / 1000).max()
    tokens_in = sum(map(len, PROMPTS))
    assert report["duration"] == pytest.approx(duration, rel=0.02)
    assert report["request_throughput"] == pytest.approx(COUNT / duration, rel=0.02)
    assert report["output_throughput"] == pytest.approx(COUNT * TOKENS / duration, rel=0.02)
    assert report["total_token_throughput"] == pytest.approx((COUNT * TOKENS + tokens_in) / duration, rel=0.02)
    assert (report["completed"], report["failed"]) == (COUNT, 0)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (tokens_in, COUNT * TOKENS)
    ends = sent + known["e2el"] / 1000
    assert report["max_concurrent_requests"] == max(int(((sent <= at) & (ends > at)).sum()) for at in sent)


def test_a_good_request_meets_every_bound(tmp_path):
    (run,), _ = bench(tmp_path, "--goodput", "ttft:100", "tpot:13", "--max-concurrency=7")
    known = truth()
    good = ((known["ttft"] <= 100) & (known["tpot"] <= 13)).sum()
    assert 0 < good < COUNT
    assert run.report["request_goodput"] * run.report["duration"] == pytest.approx(good)


def test_no_more_requests_run_than_allowed(tmp_path):
    (run,), _ = bench(tmp_path, "--max-concurrency=7")
    assert run.report["max_concurrent_requests"] == 7
    assert run.report["mean_ttft_ms"] == pytest.approx(truth()["ttft"].mean())  # waiting here is not the server's


def test_warm_ups_are_sent_and_not_counted(tmp_path):
    (run,), seen = bench(tmp_path, "--num-warmups=5")
    assert (len(seen), run.report["completed"]) == (COUNT + 5, COUNT)


def test_a_sweep_runs_once_for_each_rate(tmp_path):
    runs, _ = bench(tmp_path, "--request-rate=10,30,inf")
    assert [run.report["request_rate"] for run in runs] == [10, 30, "inf"]
    throughput = [run.report["request_throughput"] for run in runs]
    assert throughput == sorted(throughput)


def test_chats_are_asked_as_chats(tmp_path):
    prompts = [" ".join(map(str, prompt)) for prompt in PROMPTS]
    (run,), seen = bench(tmp_path, "--backend=openai-chat", "--temperature=0", "--ignore-eos", prompts=prompts)
    assert run.report["mean_ttft_ms"] == pytest.approx(truth()["ttft"].mean())
    assert seen[0] == {
        "model": "fake", "stream": True, "stream_options": {"include_usage": True}, "temperature": 0.0,
        "messages": [{"role": "user", "content": prompts[0]}], "max_completion_tokens": TOKENS, "ignore_eos": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        ("status", "HTTP 429: .*queue full"),
        ("cut", "closed the connection"),
        ("error", "the engine has failed"),
        ("no end", r"without \[DONE\]"),
    ],
)
def test_what_goes_wrong_counts_as_failed_and_is_told(tmp_path, trouble, told):
    (run,), _ = bench(tmp_path, trouble=trouble, prompts=PROMPTS[:3])
    assert (run.report["completed"], run.report["failed"], run.report["request_throughput"]) == (0, 3, 0)
    for result in run.load.results:
        with pytest.raises(AssertionError, match=told):
            raise AssertionError(result.error)


def test_connections_that_the_server_has_closed_are_no_failures(tmp_path):
    runs, _ = bench(tmp_path, "--request-rate=5,10", "--max-concurrency=2", trouble="closes")
    assert [run.report["failed"] for run in runs] == [0, 0]


def test_the_json_has_vllms_names(tmp_path):
    (run,), _ = bench(tmp_path, "--goodput", "ttft:50", "--metadata", "card=none", "tp=1", "--percentile-metrics=ttft")
    names = (
        "date label backend model_id tokenizer_id num_prompts request_rate burstiness max_concurrency duration "
        "completed failed total_input_tokens total_output_tokens request_throughput request_goodput output_throughput "
        "total_token_throughput max_output_tokens_per_s max_concurrent_requests mean_ttft_ms median_ttft_ms "
        "std_ttft_ms p99_ttft_ms card tp client_cpu_share client_p99_lateness_ms"
    )
    assert set(run.report) == set(names.split())
    json.dumps(run.report)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--request-rate=fast"], "request_rate: must be numbers"),
        (["--request-rate=0"], "request_rate: must be positive"),
        (["--goodput", "ttft:1", "speed:2"], "goodput: the metrics are"),
        (["--goodput", "ttft"], "goodput: give METRIC:MILLISECONDS"),
        (["--ramp-up-strategy=linear"], "give --ramp-up-start-rps"),
        (["--percentile-metrics=ttfb"], "percentile_metrics: ttfb"),
        (["--metric-percentiles=101"], "metric_percentiles"),
        (["--extra-body=[]"], "extra_body"),
        (["--header=x"], "header: give NAME=VALUE"),
        (["--num-prompts=0"], "num_prompts"),
        (["--no-such-flag=1"], "no_such_flag"),
        (["stray"], "unexpected argument 'stray'"),
        (["--base-url=ftp://x"], "base_url: must be http"),
    ],
)
def test_wrong_flags_are_named(tmp_path, arguments, told):
    with pytest.raises(ValueError, match=told):
        bench(tmp_path, *arguments)


def test_arrivals_have_their_rate_and_their_burstiness():
    for burstiness in (0.25, 1.0, 4.0):
        times = arrival_times(4000, 50.0, burstiness, np.random.default_rng(1))
        gaps = np.diff(times)
        assert times[0] == 0
        assert gaps.mean() == pytest.approx(1 / 50)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.1)
    assert not arrival_times(5, float("inf"), 1.0, np.random.default_rng(1)).any()


@pytest.mark.parametrize(("kind", "middle"), [("linear", 22.5), ("exponential", 200**0.5)])
def test_a_ramp_grows_from_its_start_to_its_end(kind, middle):
    ramp = Ramp(kind, 5.0, 40.0)
    assert ramp.rates(101)[[0, 50, 100]].tolist() == pytest.approx([5.0, middle, 40.0])
    gaps = np.diff(arrival_times(100000, float("inf"), 1.0, np.random.default_rng(2), ramp))
    assert 1 / gaps[:500].mean() == pytest.approx(5.0, rel=0.15)
    assert 1 / gaps[-500:].mean() == pytest.approx(40.0, rel=0.15)
