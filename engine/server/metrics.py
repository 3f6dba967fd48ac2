"""Prometheus metrics under vLLM's names with the prefix `quire:`, in a registry of their own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from engine.config import EngineConfig, ResolvedConfig
from engine.request import Group, Update

if TYPE_CHECKING:  # importing it brings JAX
    from engine.core import Stats
    from engine.speculation.speculator import SpeculationStats

PREFIX = "quire:"
SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80, 160, 640)
TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


# Name, kind, attribute of Stats, help.
_FROM_STATS = (
    ("num_requests_running", GaugeMetricFamily, "num_running", "Sequences in the running batch."),
    ("num_requests_waiting", GaugeMetricFamily, "num_waiting", "Sequences that wait to be scheduled."),
    ("kv_cache_usage_perc", GaugeMetricFamily, "kv_cache_usage", "Share of KV-cache pages in use, 0 to 1."),
    ("prefix_cache_queries", CounterMetricFamily, "prefix_cache_queries", "Tokens looked up in the prefix cache."),
    ("prefix_cache_hits", CounterMetricFamily, "prefix_cache_hits", "Tokens found in the prefix cache."),
    ("num_preemptions", CounterMetricFamily, "num_preemptions", "Preemptions by recomputation."),
    ("prompt_tokens", CounterMetricFamily, "prompt_tokens", "Prompt tokens processed."),
    ("generation_tokens", CounterMetricFamily, "generation_tokens", "Tokens generated."),
)
# Name, then what it lasts from and to, as attributes of RequestMetrics, then help.
_SPANS = (
    ("time_to_first_token_seconds", "arrival_time", "first_token_time", "From arrival to the first token."),
    ("e2e_request_latency_seconds", "arrival_time", "finished_time", "From arrival to the last token."),
    ("request_queue_time_seconds", "arrival_time", "first_scheduled_time", "From arrival to the first step."),
    ("request_prefill_time_seconds", "first_scheduled_time", "first_token_time", "From the first step to a token."),
    ("request_decode_time_seconds", "first_token_time", "finished_time", "From the first token to the last."),
    ("request_inference_time_seconds", "first_scheduled_time", "finished_time", "From the first step to the last."),
)


class Metrics:
    """Everything that /metrics shows. Belongs to the event loop."""

    def __init__(self, model_name: str):
        self.registry = CollectorRegistry(auto_describe=False)
        self._model_name = model_name
        self._stats: Stats | None = None
        self._last_token: dict[tuple[str, int], float] = {}  # request id and index -> time, in seconds
        self._success = Counter(
            f"{PREFIX}request_success", "Completions that ended, by reason.", ("model_name", "finished_reason"),
            registry=self.registry,
        )  # fmt: skip
        self._iteration_tokens = self._histogram("iteration_tokens_total", "Tokens in a step.", TOKENS)
        self._inter_token = self._histogram("inter_token_latency_seconds", "Between a completion's tokens.", SECONDS)
        self._prompt_tokens = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", TOKENS)
        self._generation_tokens = self._histogram("request_generation_tokens", "Tokens of a completion.", TOKENS)
        text = "Seconds for each of a completion's tokens after its first."
        self._per_token = self._histogram("request_time_per_output_token_seconds", text, SECONDS)
        self._spans = {span: self._histogram(span[0], span[3], SECONDS) for span in _SPANS}
        self.registry.register(self)  # pyright: ignore[reportArgumentType]  collect() is all that a collector needs

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(PREFIX + name, text, ("model_name",), buckets=buckets, registry=self.registry)
        return family.labels(self._model_name)

    def collect(self) -> Iterator[Metric]:
        """-> what the engine counted itself, for the registry; each replica on its own, numbered by `engine`."""
        if self._stats is None:
            return
        for name, kind, attribute, text in _FROM_STATS:
            metric = kind(PREFIX + name, text, labels=("model_name", "engine"))
            for number, stats in enumerate(self._stats.replicas or (self._stats,)):
                metric.add_metric((self._model_name, str(number)), getattr(stats, attribute))
            yield metric
        if self._stats.speculation is not None:
            yield from self._of_speculation(self._stats.speculation)

    def _of_speculation(self, stats: SpeculationStats) -> Iterator[Metric]:
        for name, value, text in (
            ("num_drafts", stats.num_drafts, "Times that a sequence had drafts."),
            ("num_draft_tokens", stats.num_draft_tokens, "Drafted tokens that were verified."),
            ("num_accepted_tokens", stats.num_accepted_tokens, "Drafted tokens that were right."),
        ):
            metric = CounterMetricFamily(f"{PREFIX}spec_decode_{name}", text, labels=("model_name",))
            metric.add_metric((self._model_name,), value)
            yield metric
        metric = CounterMetricFamily(
            f"{PREFIX}spec_decode_num_accepted_tokens_per_pos", "Right ones by their place, from 0.",
            labels=("model_name", "position"),
        )  # fmt: skip
        for place, count in enumerate(stats.accepted_per_position):
            metric.add_metric((self._model_name, str(place)), count)
        yield metric

    def expose(self) -> bytes:
        """-> Prometheus' text format."""
        return generate_latest(self.registry)

    def loaded(self, config: EngineConfig, resolved: ResolvedConfig, stats: Stats) -> None:
        """The engine is there."""
        self._stats = stats
        labels = {
            "block_size": resolved.page_size,
            "cache_dtype": resolved.kv_cache_dtype,
            "enable_prefix_caching": config.enable_prefix_caching,
            "gpu_memory_utilization": config.gpu_memory_utilization,
        }
        info = Gauge(
            f"{PREFIX}cache_config_info", "The KV cache's settings, as labels.", tuple(labels), registry=self.registry
        )
        info.labels(*map(str, labels.values())).set(1)

    def observe_step(self, stats: Stats, stepped: bool) -> None:
        """The engine took commands and, if `stepped`, made a step."""
        self._stats = stats
        if stepped and stats.last_iteration_tokens:
            self._iteration_tokens.observe(stats.last_iteration_tokens)

    def emitted(self, update: Update, now: float) -> None:
        """A completion got tokens at `now`, in seconds of any clock."""
        key = (update.group.request_id, update.index)
        last = self._last_token.get(key)
        if last is not None and update.token_ids:
            self._inter_token.observe((now - last) / len(update.token_ids))
        self._last_token[key] = now

    def ended(self, reason: str) -> None:
        """One completion ended."""
        self._success.labels(self._model_name, reason).inc()

    def finished(self, group: Group) -> None:
        """All completions of a request ended, or were aborted."""
        for index in range(group.params.n):
            self._last_token.pop((group.request_id, index), None)
        if group.error is not None:
            return
        self._prompt_tokens.observe(len(group.prompt_token_ids))
        first, last = group.metrics.first_token_time, group.metrics.finished_time
        for completion in group.completions:
            count = len(completion.token_ids)
            self._generation_tokens.observe(count)
            if count > 1 and first is not None and last is not None:
                self._per_token.observe(max(last - first, 0.0) / (count - 1))
        for span, histogram in self._spans.items():
            start, end = (getattr(group.metrics, name) for name in span[1:3])
            if start is not None and end is not None:
                histogram.observe(max(end - start, 0.0))
