"""From timed requests to figures, under the names that `vllm bench serve` gives them in its JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from engine.bench.requests import Result

TITLES = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}


def latencies(results: Sequence[Result]) -> dict[str, list[float]]:
    """-> seconds by metric: one for each request that succeeded, for itl one for each interval.

    tpot is (latency - ttft) / (n - 1) for n output tokens; a request with one token has none.
    """
    return {
        "ttft": [r.ttft for r in results],
        "tpot": [r.tpot for r in results if r.tpot is not None],
        "itl": [interval for r in results for interval in r.itl],
        "e2el": [r.latency for r in results],
    }


def parse_goodput(entries: Sequence[str]) -> dict[str, float]:
    """["ttft:100", "tpot:20"] -> milliseconds by metric. Errors: ValueError."""
    bounds = {}
    for entry in entries:
        name, _, value = entry.partition(":")
        try:
            bounds[name] = float(value)
        except ValueError:
            raise ValueError(f"goodput: give METRIC:MILLISECONDS, got {entry!r}") from None
        if name not in ("ttft", "tpot", "e2el") or not bounds[name] >= 0:
            raise ValueError(f"goodput: the metrics are ttft, tpot and e2el, in milliseconds; got {entry!r}")
    return bounds


def is_good(result: Result, bounds: Mapping[str, float]) -> bool:
    """-> whether a request that succeeded meets every bound, in milliseconds; one with no tpot meets that."""
    seen = {"ttft": result.ttft, "tpot": result.tpot or 0.0, "e2el": result.latency}
    return all(seen[name] * 1000 <= bound for name, bound in bounds.items())


def summarize(
    results: Sequence[Result],
    duration: float,
    *,
    metrics: Sequence[str] = tuple(TITLES),
    percentiles: Sequence[float] = (99,),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """-> counts, throughputs (a second) and latencies (milliseconds) of a run of `duration` seconds."""
    good = [r for r in results if not r.error]
    tokens_in, tokens_out = sum(r.prompt_len for r in good), sum(r.output_len for r in good)
    a_second = lambda count: count / duration if duration > 0 else 0.0
    summary: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(results) - len(good),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": a_second(len(good)),
        "request_goodput": a_second(sum(is_good(r, goodput) for r in good)) if goodput else None,
        "output_throughput": a_second(tokens_out),
        "total_token_throughput": a_second(tokens_in + tokens_out),
        "max_output_tokens_per_s": _most_tokens_in_a_second(good),
        "max_concurrent_requests": _most_at_once(good),
    }
    found = latencies(good)
    for name in metrics:
        values = np.array(found[name] or [0.0]) * 1000
        summary |= {
            f"mean_{name}_ms": float(values.mean()),
            f"median_{name}_ms": float(np.median(values)),
            f"std_{name}_ms": float(values.std()),
        }
        for percentile in percentiles:
            summary[f"p{percentile:g}_{name}_ms"] = float(np.percentile(values, percentile))
    return summary


def details(results: Sequence[Result], start: float) -> dict[str, Any]:
    """-> vLLM's lists of everything by request; times are seconds, start_times since the run began."""
    return {
        "input_lens": [r.prompt_len for r in results],
        "output_lens": [r.output_len for r in results],
        "start_times": [r.start - start for r in results],
        "ttfts": [r.ttft for r in results],
        "itls": [r.itl for r in results],
        "generated_texts": [r.text for r in results],
        "errors": [r.error for r in results],
    }


def _most_tokens_in_a_second(results: Sequence[Result]) -> float:
    """-> pieces with tokens in the fullest of the run's seconds."""
    times = [r.start + r.ttft + after for r in results for after in (0.0, *np.cumsum(r.itl).tolist())]
    if not times:
        return 0.0
    return float(np.bincount((np.array(times) - min(r.start for r in results)).astype(int)).max())


def _most_at_once(results: Sequence[Result]) -> int:
    """-> the most requests that ran at one time."""
    changes = sorted([(r.start, 1) for r in results] + [(r.start + r.latency, -1) for r in results])
    return int(np.cumsum([change for _, change in changes]).max(initial=0))


def table(summary: Mapping[str, Any], metrics: Sequence[str]) -> str:
    """-> the summary as text, in the order and the words that users of vLLM's know."""
    width = 64
    rows = [
        ("Successful requests:", summary["completed"]),
        ("Failed requests:", summary["failed"]),
        ("Benchmark duration (s):", summary["duration"]),
        ("Total input tokens:", summary["total_input_tokens"]),
        ("Total generated tokens:", summary["total_output_tokens"]),
        ("Request throughput (req/s):", summary["request_throughput"]),
        *([("Request goodput (req/s):", summary["request_goodput"])] if summary["request_goodput"] is not None else []),
        ("Output token throughput (tok/s):", summary["output_throughput"]),
        ("Peak output token throughput (tok/s):", summary["max_output_tokens_per_s"]),
        ("Peak concurrent requests:", summary["max_concurrent_requests"]),
        ("Total token throughput (tok/s):", summary["total_token_throughput"]),
    ]
    line = lambda name, value: f"{name:<44}{value:>{width - 44}{'.2f' if isinstance(value, float) else ''}}"
    lines = [" Serving Benchmark Result ".center(width, "="), *(line(*row) for row in rows)]
    for name in metrics:
        lines.append(f" {TITLES[name]} ".center(width, "-"))
        ending = f"_{name}_ms"
        for key in (key for key in summary if key.endswith(ending) and not key.startswith("std")):
            lines.append(line(f"{key.removesuffix(ending).capitalize()} {name.upper()} (ms):", summary[key]))
    lines.append(" Load Generator ".center(width, "-"))
    lines.append(line("Its CPU time (% of one core):", summary["client_cpu_share"] * 100))
    lines.append(line("Requests sent late, p99 (ms):", summary["client_p99_lateness_ms"]))
    return "\n".join([*lines, "=" * width])
