"""EngineConfig: every setting of the engine, its default and its check, and the command-line flags made from it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from absl import flags

from engine.pages import PAGE_SIZES, default_page_size
from engine.speculative_config import METHODS, read_speculative_config

DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = (
    "gguf", "fp8", "mxfp4", "awq", "gptq", "compressed-tensors", "dequantize", "int8", "int8_w8a8",
    "int8_block", "fp8_block", "int4",
)  # fmt: skip
NARROW_KV_DTYPES = {
    "fp8": "float8_e4m3fn", "fp8_e4m3": "float8_e4m3fn", "fp8_e5m2": "float8_e5m2", "int8": "int8"
}  # fmt: skip


def _setting(
    default: Any, help: str, *, choices: tuple[str, ...] = (), low: float | None = None, kind: type = str
) -> Any:
    metadata = {"help": help, "choices": choices, "low": low, "kind": kind}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class EngineConfig:
    """Settings under vLLM's names. None means: from the model or the device (`resolve`). Errors: ValueError."""

    model: str = _setting("", "A GGUF file, a folder with safetensors or from engine.convert, or ORG/NAME on the hub.")
    revision: str | None = _setting(None, "Branch, tag or commit of a model on the hub; default: its main branch.")
    tokenizer: str | None = _setting(None, "Where the tokenizer is, if not with the model.")
    skip_tokenizer_init: bool = _setting(
        False, "Load no tokenizer: prompts are token ids, no text comes back.", kind=bool
    )
    load_format: str = _setting("auto", "'dummy' draws random weights of the model's shape.", choices=("auto", "dummy"))
    dtype: str = _setting("auto", "Of weights and activations; auto: float32 on CPU, else bfloat16.", choices=DTYPES)
    kv_cache_dtype: str = _setting(
        "auto",
        "Of the KV cache; auto: as dtype, fp8: fp8_e4m3. In 8 bits with the checkpoint's scales; int8 measures missing "
        "ones.",
        choices=(*DTYPES, *NARROW_KV_DTYPES),
    )
    quantization: str | None = _setting(
        None,
        "How weights are kept: as the checkpoint has them (gguf, fp8, mxfp4, awq, gptq, compressed-tensors), expanded "
        "(dequantize), or quantized while they are loaded (int8, int8_w8a8, int8_block, fp8, fp8_block, int4). "
        "Default: as the checkpoint has them, on a CPU expanded.",
        choices=QUANTIZATIONS,
    )
    max_model_len: int | None = _setting(None, "Longest sequence, in tokens; default: the model's.", low=1, kind=int)
    max_num_seqs: int | None = _setting(
        None, "Most sequences in a step; default: 32 on CPU, else 256.", low=1, kind=int
    )
    max_num_batched_tokens: int | None = _setting(
        None, "Most tokens in a step; default: 512 on CPU, else 8192.", low=1, kind=int
    )
    gpu_memory_utilization: float = _setting(
        0.9, "Share of the device's memory for weights, temporaries and KV cache.", low=0.0, kind=float
    )
    kv_cache_memory_bytes: int | None = _setting(
        None, "Memory of the KV cache instead of what gpu_memory_utilization leaves; default on CPU: 10 % of RAM.",
        low=1, kind=int,
    )  # fmt: skip
    block_size: int | None = _setting(None, f"Tokens in a page, one of {PAGE_SIZES}; default by rule.", kind=int)
    num_gpu_blocks_override: int | None = _setting(
        None, "Number of KV-cache pages, instead of computing it.", low=1, kind=int
    )
    enable_prefix_caching: bool = _setting(
        True, "Share KV-cache pages between requests with a common prefix.", kind=bool
    )
    scheduling_policy: str = _setting("fcfs", "Who runs first.", choices=("fcfs", "priority"))
    tensor_parallel_size: int = _setting(1, "Devices that share each layer.", low=1, kind=int)
    pipeline_parallel_size: int = _setting(1, "Stages of layers, each on devices of its own.", low=1, kind=int)
    data_parallel_size: int = _setting(1, "Replicas of the engine, each on devices of its own.", low=1, kind=int)
    parallel: str = _setting(
        "manual", "auto: choose the three sizes by how the devices are connected.", choices=("manual", "auto")
    )
    enable_expert_parallel: bool = _setting(
        False, "Spread whole experts over the devices of a layer, instead of a part of each one's width.", kind=bool
    )
    disable_custom_all_reduce: bool = _setting(
        False, "Leave small sums of two GPUs to XLA, too, instead of to a kernel within the step's graph.", kind=bool
    )
    coordinator_address: str | None = _setting(
        None, "HOST:PORT of process 0, where jax.distributed joins the processes of one engine."
    )
    num_processes: int | None = _setting(None, "Processes of one engine, usually one a host.", low=2, kind=int)
    process_id: int | None = _setting(None, "Which of them this is; 0 serves requests and plans.", low=0, kind=int)
    control_address: str | None = _setting(
        None, "HOST:PORT where process 0 listens for the others, and they find it; an address of a private network."
    )
    secret_file: str | None = _setting(None, "A file with the secret by which the processes know each other.")
    attention_backend: str = _setting("auto", "A name of kernels.attention.BACKENDS.")
    speculative_config: Mapping[str, Any] | None = _setting(
        None, "JSON: method (" + ", ".join(METHODS) + "), num_speculative_tokens, and the method's own.", kind=dict
    )
    chat_template: str | None = _setting(
        None, "For every chat: a Jinja file, Jinja, or the name of one of the model's."
    )
    compilation_cache_dir: str | None = _setting(
        None, "Where compiled steps are kept; default: ~/.cache/quire, or JAX's own cache if that is set up."
    )
    profile_dir: str | None = _setting(None, "Folder for profiler traces; without it none can be asked for.")
    seed: int = _setting(0, "Draws the seeds of requests that name none, and dummy weights.", kind=int)

    def __post_init__(self):
        for setting in SETTINGS:
            value, meta = getattr(self, setting.name), setting.metadata
            if value is None and setting.default is None:
                continue
            number = meta["kind"] in (int, float)
            if isinstance(value, bool) != (meta["kind"] is bool) or not isinstance(
                value, (int, float) if meta["kind"] is float else meta["kind"]
            ):
                raise ValueError(f"{setting.name}: must be of type {meta['kind'].__name__}, got {value!r}")
            if meta["choices"] and value not in meta["choices"]:
                raise ValueError(f"{setting.name}: must be one of {meta['choices']}, got {value!r}")
            if number and meta["low"] is not None and not value >= meta["low"]:
                raise ValueError(f"{setting.name}: must be at least {meta['low']}, got {value}")
        if not self.model:
            raise ValueError("model: name a GGUF file, a folder, or a repository of the hub")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(f"gpu_memory_utilization: must be in (0, 1], got {self.gpu_memory_utilization}")
        if self.block_size is not None and self.block_size not in PAGE_SIZES:
            raise ValueError(f"block_size: must be one of {PAGE_SIZES}, got {self.block_size}")
        sizes = (self.tensor_parallel_size, self.pipeline_parallel_size, self.data_parallel_size)
        if self.parallel == "auto" and sizes != (1, 1, 1):
            raise ValueError("parallel: auto chooses the sizes; leave tensor_, pipeline_ and data_parallel_size out")
        together = ("coordinator_address", "num_processes", "process_id", "control_address", "secret_file")
        given = [name for name in together if getattr(self, name) is not None]
        if given and len(given) < len(together):
            missing = next(name for name in together if name not in given)
            raise ValueError(f"{missing}: must be given with {given[0]}; {', '.join(together)} belong together")
        if self.num_processes is not None and self.process_id is not None:
            if self.process_id >= self.num_processes:
                raise ValueError(f"process_id: must be below num_processes {self.num_processes}, got {self.process_id}")
            if self.data_parallel_size > 1:
                raise ValueError(
                    f"data_parallel_size: {self.data_parallel_size} replicas in {self.num_processes} processes are not "
                    "supported; run a server for each replica"
                )
        if self.speculative_config is not None:
            read_speculative_config(self.speculative_config)

    def resolve(self, *, model_max_len: int, platform: str) -> ResolvedConfig:
        """-> the settings with every default filled in for a model and a platform ("cpu", "gpu", "tpu")."""
        cpu = platform == "cpu"
        max_model_len = self.max_model_len or model_max_len
        if max_model_len > model_max_len:
            raise ValueError(f"max_model_len: {max_model_len} is more than the model's {model_max_len}")
        batched = self.max_num_batched_tokens or max(512 if cpu else 8192, self.max_num_seqs or 0)
        seqs = self.max_num_seqs or min(32 if cpu else 256, batched)
        if batched < seqs:
            raise ValueError(
                f"max_num_batched_tokens: {batched} is less than max_num_seqs {seqs}; every one needs a token a step"
            )
        dtype = ("float32" if cpu else "bfloat16") if self.dtype == "auto" else self.dtype
        kv_dtype = NARROW_KV_DTYPES.get(self.kv_cache_dtype, self.kv_cache_dtype)
        return ResolvedConfig(
            dtype=dtype,
            kv_cache_dtype=dtype if self.kv_cache_dtype == "auto" else kv_dtype,
            max_model_len=max_model_len,
            max_num_seqs=seqs,
            max_num_batched_tokens=batched,
            page_size=self.block_size or (16 if platform == "gpu" else default_page_size(max_model_len)),
        )


@dataclass(frozen=True)
class ResolvedConfig:
    """The settings whose defaults depend on the model or the device."""

    dtype: str
    kv_cache_dtype: str
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    page_size: int


SETTINGS = tuple(f for f in dataclasses.fields(EngineConfig) if f.metadata)


def make_config(**settings: Any) -> EngineConfig:
    """-> EngineConfig. Errors: ValueError, also for a setting that does not exist."""
    known = {f.name for f in dataclasses.fields(EngineConfig)}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: not supported; the settings are {', '.join(sorted(known))}")
    return EngineConfig(**settings)


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
    """Define one flag for each setting."""
    for s in SETTINGS:
        text, kind, default = s.metadata["help"], s.metadata["kind"], cast(Any, s.default)
        if s.metadata["choices"]:
            flags.DEFINE_enum(s.name, default, list(s.metadata["choices"]), text, flag_values=values)
        elif kind is bool:
            flags.DEFINE_boolean(s.name, default, text, flag_values=values)
        elif kind is int:
            flags.DEFINE_integer(s.name, default, text, flag_values=values)
        elif kind is float:
            flags.DEFINE_float(s.name, default, text, flag_values=values)
        else:
            flags.DEFINE_string(s.name, default, text, flag_values=values)


def config_from_flags(values: flags.FlagValues = flags.FLAGS) -> EngineConfig:
    """-> EngineConfig from parsed flags. Errors: ValueError."""
    return make_config(**{s.name: _from_flag(s, values[s.name].value) for s in SETTINGS})


def _from_flag(setting: dataclasses.Field[Any], value: Any) -> Any:
    return json_setting(setting.name, value) if setting.metadata["kind"] is dict else value


def json_setting(name: str, text: str | None) -> Any:
    """-> what a flag says in JSON. Errors: ValueError."""
    try:
        return None if text is None else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}: not valid JSON: {error}") from None
