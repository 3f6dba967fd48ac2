"""`python -m engine.bench serve`: load on a server that speaks OpenAI's interface, and what it made of it."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from tqdm import tqdm

from engine.bench import metrics
from engine.bench.client import HttpClient, parse_url
from engine.bench.datasets import Sample, as_text, define_dataset_flags, load_samples
from engine.bench.load import Load, Ramp, arrival_times, run_load
from engine.bench.requests import ENDPOINTS, Result, body_of, send
from engine.tokenizer import Tokenizer

PURPOSE = "load on a server that speaks OpenAI's interface, and how long it lets its users wait"
SEVERAL = ("goodput", "metadata", "header")  # flags that take one value or more
_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty", "repetition_penalty")


def define(values: flags.FlagValues) -> None:
    """Define the command's flags."""
    string, integer, number, boolean = (
        flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float, flags.DEFINE_boolean
    )  # fmt: skip
    at: Any = {"flag_values": values}
    flags.DEFINE_enum("backend", "openai", list(ENDPOINTS), "Which interface: completions or chat.", **at)
    string("base_url", None, "http://HOST:PORT of the server, instead of --host and --port.", **at)
    string("host", "127.0.0.1", "The server's address.", **at)
    integer("port", 8000, "The server's port.", **at)
    string("endpoint", None, "Path of the requests; default: by --backend.", **at)
    string("model", None, "Name of the model in requests; default: the first that the server lists.", **at)
    string("tokenizer", None, "GGUF file or folder of the tokenizer; default: where the server has its model.", **at)
    flags.DEFINE_multi_string("header", [], "NAME=VALUE headers to send along, such as an API key's.", **at)
    string("extra_body", "{}", "JSON: more fields for every request.", **at)
    define_dataset_flags(values)
    flags.DEFINE_enum(
        "prompt_format", None, ["ids", "text"],
        "Random prompts as token ids, which keeps their lengths, or as text; default: ids, for chats text.", **at,
    )  # fmt: skip
    integer("seed", 0, "Draws prompts and arrivals.", **at)
    boolean("ignore_eos", False, "Ask the server to go on to the full length.", **at)
    for name in _SAMPLING:
        number(name, None, f"{name} of every request; default: the server's.", **at)
    string("request_rate", "inf", "Requests a second, or several as 1,2,4,inf: one run for each.", **at)
    number("burstiness", 1.0, "1: Poisson arrivals; less: burstier, more: steadier (gamma).", lower_bound=1e-6, **at)
    flags.DEFINE_enum("ramp_up_strategy", None, ["linear", "exponential"], "Let the rate grow over the run.", **at)
    number("ramp_up_start_rps", None, "Requests a second at the ramp's start.", lower_bound=1e-6, **at)
    number("ramp_up_end_rps", None, "Requests a second at the ramp's end.", lower_bound=1e-6, **at)
    integer("max_concurrency", None, "Most requests at a time; the others wait here.", lower_bound=1, **at)
    integer("num_warmups", 0, "Requests that are sent before, and not counted.", lower_bound=0, **at)
    number("ready_check_timeout_sec", 600.0, "Seconds to wait for the server to be ready.", lower_bound=0, **at)
    number("request_timeout", 21600.0, "Seconds after which a request counts as failed.", lower_bound=1e-3, **at)
    boolean("profile", False, "Let the server profile the run (/start_profile, /stop_profile).", **at)
    string("percentile_metrics", "ttft,tpot,itl,e2el", "Latencies to report.", **at)
    string("metric_percentiles", "99", "Percentiles to report, such as 50,90,99.", **at)
    flags.DEFINE_multi_string("goodput", [], "METRIC:MS bounds (ttft, tpot, e2el) of a good request.", **at)
    boolean("save_result", False, "Write a JSON file for each run.", **at)
    boolean("save_detailed", False, "With every request's times and text in it.", **at)
    string("result_dir", ".", "Folder of the files.", **at)
    string("result_filename", None, "Name of the file of a single run; default: from rate, model and time.", **at)
    flags.DEFINE_multi_string("metadata", [], "KEY=VALUE to put into the JSON.", **at)
    string("label", None, "What to call the server in file names; default: --backend.", **at)
    boolean("plot", False, "Draw the runs as PNG pictures into --result-dir (needs matplotlib).", **at)
    boolean("disable_tqdm", False, "Show no progress bar.", **at)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line, checked."""

    rates: list[float]
    ramp: Ramp | None
    metrics: list[str]
    percentiles: list[float]
    goodput: dict[str, float]
    extra_body: dict[str, Any]
    headers: dict[str, str]
    metadata: dict[str, str]


def read_settings(values: flags.FlagValues) -> Settings:
    """-> the flags that need reading. Errors: ValueError that names the flag."""
    rates = _numbers("request_rate", values.request_rate)
    if not all(rate > 0 for rate in rates):
        raise ValueError(f"request_rate: must be positive, got {values.request_rate}")
    ramp = None
    if values.ramp_up_strategy:
        if values.ramp_up_start_rps is None or values.ramp_up_end_rps is None:
            raise ValueError("ramp_up_strategy: give --ramp-up-start-rps and --ramp-up-end-rps too")
        if rates != [math.inf]:
            raise ValueError("ramp_up_strategy: the ramp gives the rate; leave --request-rate out")
        ramp = Ramp(values.ramp_up_strategy, values.ramp_up_start_rps, values.ramp_up_end_rps)
    names = [name for name in values.percentile_metrics.split(",") if name]
    if unknown := [name for name in names if name not in metrics.TITLES]:
        raise ValueError(f"percentile_metrics: {', '.join(unknown)}; there are {', '.join(metrics.TITLES)}")
    percentiles = _numbers("metric_percentiles", values.metric_percentiles)
    if not all(0 <= p <= 100 for p in percentiles):
        raise ValueError(f"metric_percentiles: must be in [0, 100], got {values.metric_percentiles}")
    try:
        extra = json.loads(values.extra_body)
    except ValueError as error:
        raise ValueError(f"extra_body: not JSON: {error}") from None
    if not isinstance(extra, dict):
        raise ValueError(f"extra_body: must be an object, got {values.extra_body}")
    if values.result_filename and len(rates) > 1:
        raise ValueError("result_filename: several rates make several files; leave it out")
    sampling: dict[str, Any] = {name: values[name].value for name in _SAMPLING if values[name].value is not None}
    if "top_k" in sampling:
        sampling["top_k"] = int(sampling["top_k"])
    return Settings(
        rates, ramp, names, percentiles, metrics.parse_goodput(values.goodput), sampling | extra,
        _pairs("header", values.header), _pairs("metadata", values.metadata),
    )  # fmt: skip


def _numbers(name: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"{name}: must be numbers with commas between, got {text!r}") from None


def _pairs(name: str, entries: Sequence[str]) -> dict[str, str]:
    if wrong := [entry for entry in entries if "=" not in entry]:
        raise ValueError(f"{name}: give NAME=VALUE, got {wrong[0]!r}")
    return dict(entry.split("=", 1) for entry in entries)


def main(values: flags.FlagValues) -> None:
    """Run the command. Errors: ValueError."""
    settings = read_settings(values)
    if values.plot:
        from engine.bench import plots

        plots.check()
    show = lambda run: print(metrics.table(run.report, settings.metrics), flush=True)
    runs = asyncio.run(bench(values, settings, show))
    folder = Path(values.result_dir)
    if values.save_result or values.plot:
        folder.mkdir(parents=True, exist_ok=True)
    for run in runs:
        if values.save_result:
            name = values.result_filename or run.file_name(values.label or values.backend, values.max_concurrency)
            kept = run.report | (metrics.details(run.load.results, run.start) if values.save_detailed else {})
            (folder / name).write_text(json.dumps(kept, indent=1))
            print(f"wrote {folder / name}")
    if values.plot:
        for path in plots.draw(runs, folder):
            print(f"wrote {path}")
    if any(run.report["failed"] for run in runs):
        first = next(result.error for run in runs for result in run.load.results if result.error)
        raise ValueError(f"some requests failed, the first with: {first}")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run at one rate: its report, as it goes into JSON, and what it was made from."""

    rate: float
    report: dict[str, Any]
    load: Load

    @property
    def start(self) -> float:
        return min(result.start for result in self.load.results)

    def file_name(self, label: str, concurrency: int | None) -> str:
        model = Path(self.report["model_id"]).name
        among = f"-concurrency{concurrency}" if concurrency else ""
        return f"{label}-{self.rate:g}qps{among}-{model}-{self.report['date']}.json"


async def bench(
    values: flags.FlagValues, settings: Settings, on_run: Callable[[Run], None] = lambda run: None
) -> list[Run]:
    """-> a run for each rate; `on_run` gets each as it ends. Errors: ValueError."""
    client = HttpClient(parse_url(values.base_url or f"http://{values.host}:{values.port}"), settings.headers)
    try:
        model, root = await wait_until_ready(client, values.ready_check_timeout_sec, values.model)
        tokenizer = open_tokenizer(values.tokenizer, root)
        samples = make_samples(values, tokenizer)
        path = values.endpoint or ENDPOINTS[values.backend]
        bodies = [body_of(s, model, values.backend, settings.extra_body, values.ignore_eos) for s in samples]
        requests = [lambda body=body: send(client, path, body, values.request_timeout) for body in bodies]
        await warm_up(requests[: values.num_warmups])
        runs = []
        for rate in settings.rates:
            if runs:  # each rate from the same state; a server without this route says so, and that is no matter
                await client.post("/reset_prefix_cache")
            runs.append(await _run(values, settings, client, model, requests, rate))
            on_run(runs[-1])
        return runs
    except OSError as error:
        raise ValueError(f"base_url: {client.url.host}:{client.url.port}: {error}") from None
    finally:
        client.close()


async def _run(
    values: flags.FlagValues,
    settings: Settings,
    client: HttpClient,
    model: str,
    requests: Sequence[Callable[[], Awaitable[Result]]],
    rate: float,
) -> Run:
    random = np.random.default_rng(values.seed)
    arrivals = arrival_times(len(requests), rate, values.burstiness, random, settings.ramp)
    if values.profile:
        await _must_post(client, "/start_profile")
    started = time.perf_counter()
    with tqdm(total=len(requests), desc=f"{rate:g} req/s", unit="req", disable=values.disable_tqdm or None) as bar:
        tokens = 0

        def on_result(result: Result) -> None:
            nonlocal tokens
            tokens += result.output_len
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - started):.0f} tok/s", refresh=False)
            bar.update()

        load = await run_load(requests, arrivals, values.max_concurrency, on_result)
    if values.profile:
        await _must_post(client, "/stop_profile")
    summary = metrics.summarize(
        load.results, load.duration,
        metrics=settings.metrics, percentiles=settings.percentiles, goodput=settings.goodput,
    )  # fmt: skip
    about = {
        "date": datetime.now().strftime("%Y%m%d-%H%M%S"),
        "backend": values.backend,
        "label": values.label,
        "model_id": model,
        "tokenizer_id": values.tokenizer,
        "num_prompts": len(requests),
        **settings.metadata,
        "request_rate": rate if math.isfinite(rate) else "inf",
        "burstiness": values.burstiness,
        "max_concurrency": values.max_concurrency,
    }
    if settings.ramp:
        ramp = settings.ramp
        about |= dict(ramp_up_strategy=ramp.kind, ramp_up_start_rps=ramp.start, ramp_up_end_rps=ramp.end)
    own = {
        "client_cpu_share": load.cpu_share,
        "client_p99_lateness_ms": float(np.percentile(load.lateness, 99) * 1000),
    }
    return Run(rate, about | summary | own, load)


def make_samples(values: flags.FlagValues, tokenizer: Tokenizer | None) -> list[Sample]:
    """-> the requests, their prompts in the form that the backend takes. Errors: ValueError."""
    if tokenizer is None and values.dataset_name != "custom":
        raise ValueError(
            f"tokenizer: the dataset {values.dataset_name} needs one, and the server's model is not on this machine; "
            "give --tokenizer"
        )
    samples = load_samples(values, tokenizer, tokenizer.vocab_size if tokenizer else 0, values.seed)
    form = values.prompt_format or ("text" if values.backend == "openai-chat" else "ids")
    if form == "ids" and values.backend == "openai-chat":
        raise ValueError("prompt_format: a chat takes text")
    if form == "text" and any(not isinstance(sample.prompt, str) for sample in samples):
        if tokenizer is None:
            raise ValueError("tokenizer: prompts of token ids become text by a tokenizer; give --tokenizer")
        samples = as_text(samples, tokenizer)
    return samples


def open_tokenizer(name: str | None, root: str | None) -> Tokenizer | None:
    """-> the tokenizer that is named, else that of the server's model if its files are on this machine."""
    if name is None and (root is None or not Path(root).exists()):
        return None
    from engine.tokenizer_files import load_tokenizer
    from engine.weights.hub import locate

    return load_tokenizer(locate(name or str(root), weights=False, setting="tokenizer"))


async def wait_until_ready(client: HttpClient, timeout: float, model: str | None = None) -> tuple[str, str | None]:
    """-> name and root of the model, when the server lists it. Errors: ValueError, also after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            status, body = await client.get("/v1/models")
        except OSError as error:
            status, body, why = 0, b"", str(error)
        else:
            why = f"/v1/models answers {status}: {body[:200].decode(errors='replace')}"
        if status == 200:
            break
        if status in (401, 403, 404) or time.monotonic() > deadline:
            raise ValueError(f"base_url: {client.url.host}:{client.url.port} is not ready: {why}")
        await asyncio.sleep(0.1)
    try:
        cards = {card["id"]: card.get("root") for card in json.loads(body)["data"]}
        name = model or next(iter(cards))
    except (ValueError, KeyError, TypeError, AttributeError, StopIteration):
        raise ValueError(f"base_url: /v1/models answers what is no list of models: {body[:200]!r}") from None
    return name, cards.get(name)


async def warm_up(requests: Sequence[Callable[[], Awaitable[Result]]]) -> None:
    """Send requests whose times do not count. Errors: ValueError, if one fails."""
    for result in await asyncio.gather(*(request() for request in requests)):
        if result.error:
            raise ValueError(f"num_warmups: a request failed: {result.error}")


async def _must_post(client: HttpClient, path: str) -> None:
    status, body = await client.post(path)
    if status != 200:
        raise ValueError(f"profile: {path} answers {status}: {body[:500].decode(errors='replace')}")
