"""SGLang's constructor keywords, read as Caesura's configuration.

Each keyword that SGLang users pass is one of three kinds: it has a meaning here; it tunes something
that does not exist here, and is ignored with a warning; or it asks for something that Caesura does
not do, and is refused unless it says so.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from frontend.config import BUNDLED_MODEL_DIRECTORY, FrontendConfig
from ipc.engine_config import EngineConfig

logger = logging.getLogger(__name__)

_DTYPES = {"half": "float16", "float": "float32"}
"""SGLang's other names."""
_ENGINE_NAMES = {
    "dtype": "dtype",
    "device": "device",
    "context_length": "max_model_len",
    "max_running_requests": "max_num_seqs",
    "chunked_prefill_size": "max_num_batched_tokens",
    "page_size": "block_size",
    "random_seed": "seed",
}
_FRONTEND_NAMES = {
    "served_model_name": "served_model_name",
    "dp_size": "data_parallel_size",
    "stream_interval": "stream_interval",
    "max_queued_requests": "max_num_queued_requests",
}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
_OTHER_NAMES = (
    *("model_path", "model", "tokenizer_path", "skip_tokenizer_init", "log_level"),
    "weight_version",
    *("max_total_tokens", "disable_radix_cache"),
)
_ONLY: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("tp_size", "pp_size", "ep_size", "nnodes"), (1,)),
    **dict.fromkeys(("quantization", "lora_paths", "speculative_algorithm"), ()),
    **dict.fromkeys(("enable_lora", "is_embedding", "enable_dp_attention"), (False,)),
    **dict.fromkeys(("enable_deterministic_inference", "incremental_streaming_output"), (False,)),
    "kv_cache_dtype": ("auto",),
    "load_format": ("auto", "safetensors"),
    "disaggregation_mode": ("null",),
    "json_model_override_args": ("{}",),
}
"""The only values of these, besides None, that ask for nothing Caesura lacks."""
_IGNORED = frozenset(
    {
        *("trust_remote_code", "tokenizer_mode", "tokenizer_worker_num", "revision"),
        *("download_dir", "skip_server_warmup", "warmups"),
        *("mem_fraction_static", "max_prefill_tokens"),
        *("schedule_policy", "schedule_conservativeness", "enable_priority_scheduling"),
        *("radix_eviction_policy", "retraction_policy", "load_balance_method"),
        *("disable_overlap_schedule", "enable_mixed_chunk", "num_continuous_decode_steps"),
        *("disable_cuda_graph", "disable_cuda_graph_padding", "cuda_graph_max_bs"),
        *("cuda_graph_bs", "enable_torch_compile", "torch_compile_max_bs"),
        *("attention_backend", "prefill_attention_backend", "decode_attention_backend"),
        *("sampling_backend", "grammar_backend", "disable_custom_all_reduce"),
        *("enable_p2p_check", "enable_nan_detection", "enable_memory_saver"),
        *("enable_weights_cpu_backup", "delete_ckpt_after_loading"),
        *("base_gpu_id", "gpu_id_step", "node_rank", "dist_init_addr", "dist_timeout"),
        *("nccl_port", "host", "port", "api_key", "admin_api_key", "log_level_http"),
        *("log_requests", "log_requests_level", "show_time_cost", "enable_metrics"),
        *("decode_log_interval", "watchdog_timeout", "sleep_on_idle"),
    }
)
_KNOWN = frozenset({*_ENGINE_NAMES, *_FRONTEND_NAMES, *_OTHER_NAMES, *_ONLY, *_IGNORED})


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineArguments:
    """What an `Engine` was asked to be."""

    config: FrontendConfig
    log_level: str | None = None
    """Of this process's front end and of the engines; None leaves ours alone and quiets theirs."""
    skip_tokenizer_init: bool = False
    """Results have token ids and no text."""
    weight_version: str | None = None
    """The first label of the weights; None leaves it to the engines."""


def read_arguments(keywords: Mapping[str, Any]) -> EngineArguments:
    """Read SGLang's keywords; without a model it is the bundled one. None stands for a default.

    Raises TypeError naming an unknown keyword and ValueError naming a value that is not supported.
    """
    for name in keywords:
        if name not in _KNOWN:
            nearest = difflib.get_close_matches(name, _KNOWN, n=1, cutoff=0)[0]
            raise TypeError(
                f"Engine() got an unexpected keyword argument {name!r}; did you mean {nearest!r}?"
            )
    given = {name: value for name, value in keywords.items() if value is not None}
    for name, allowed in _ONLY.items():
        if name in given and given[name] not in allowed:
            others = " or ".join(map(repr, allowed))
            raise ValueError(
                f"{name}={given[name]!r} is not supported; leave it out"
                + (f" or set {others}" if others else "")
            )
    if ignored := sorted(_IGNORED & given.keys()):
        logger.warning("ignored, for they have no meaning in Caesura: %s", ", ".join(ignored))

    engine = EngineConfig(model=_model(given), **_engine_fields(given))
    if "max_total_tokens" in given:
        num_blocks = max(1, given["max_total_tokens"] // engine.block_size)
        engine = dataclasses.replace(engine, num_gpu_blocks_override=num_blocks)
    return EngineArguments(
        config=FrontendConfig(
            engine=engine,
            **{ours: given[name] for name, ours in _FRONTEND_NAMES.items() if name in given},
        ),
        log_level=_log_level(given.get("log_level")),
        skip_tokenizer_init=given.get("skip_tokenizer_init", False),
        weight_version=given.get("weight_version"),
    )


def _log_level(name: str | None) -> str | None:
    if name is None:
        return None
    level = "ERROR" if name.upper() == "CRITICAL" else name.upper()
    if level not in _LEVELS:
        raise ValueError(
            f"log_level={name!r} is no log level; set one of {', '.join(_LEVELS).lower()}"
        )
    return level


def _model(given: Mapping[str, Any]) -> str:
    named = {str(given[name]) for name in ("model_path", "model") if name in given}
    if len(named) > 1:
        raise ValueError(f"model_path and model name different models: {sorted(named)}; give one")
    model = named.pop() if named else str(BUNDLED_MODEL_DIRECTORY)
    if (tokenizer := given.get("tokenizer_path", model)) != model:
        raise ValueError(
            f"tokenizer_path={tokenizer!r} is not the model {model!r}, which is not supported; "
            "put the tokenizer's files into the model's directory"
        )
    return model


def _engine_fields(given: Mapping[str, Any]) -> dict[str, Any]:
    fields = {ours: given[name] for name, ours in _ENGINE_NAMES.items() if name in given}
    if fields.get("dtype") in _DTYPES:
        fields["dtype"] = _DTYPES[fields["dtype"]]
    if fields.get("max_num_batched_tokens") == -1:
        raise ValueError(
            "chunked_prefill_size=-1 would switch chunked prefill off, which is not supported; "
            "leave it out or set a number of tokens"
        )
    if "disable_radix_cache" in given:
        fields["enable_prefix_caching"] = not given["disable_radix_cache"]
    return fields
