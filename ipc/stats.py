"""What an engine reports of its scheduler's state with its outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from ipc import expect

_Record = TypeVar("_Record")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCacheStats:
    """Counts since the last report; queries and hits are in tokens."""

    reset: bool = False
    requests: int = 0
    queries: int = 0
    hits: int = 0
    preempted_requests: int = 0
    preempted_queries: int = 0
    preempted_hits: int = 0
    hits_by_source: Mapping[object, object] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """State after a step, in vLLM's 18 keys. vllm-rs needs most of them, so a map is always written
    whole."""

    num_running_reqs: int = 0
    num_waiting_reqs: int = 0
    num_skipped_waiting_reqs: int = 0
    num_kv_fetch_reqs_by_stage: Mapping[object, object] = field(default_factory=dict)
    step_counter: int = 0
    current_wave: int = 0
    kv_cache_usage: float = 0.0
    """Share of the blocks that requests hold, 0 to 1."""
    iteration_details: object = None
    prefix_cache_stats: PrefixCacheStats = PrefixCacheStats()
    connector_prefix_cache_stats: object = None
    kv_cache_eviction_events: list[object] = field(default_factory=list)
    spec_decoding_stats: object = None
    kv_connector_stats: object = None
    ec_connector_stats: object = None
    waiting_lora_adapters: Mapping[object, object] = field(default_factory=dict)
    running_lora_adapters: Mapping[object, object] = field(default_factory=dict)
    cudagraph_stats: object = None
    perf_stats: object = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillStats:
    """How a request's prompt was computed, in tokens; sent with its first output."""

    num_prompt_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    num_local_cached_tokens: int = 0
    num_external_cached_tokens: int = 0
    num_cache_creation_tokens: int = 0


def record_to_wire(record: Any) -> dict[str, object]:
    """The map of a record's fields, nested records included."""
    return {
        name: record_to_wire(value)
        if dataclasses.is_dataclass(value := getattr(record, name))
        else value
        for name in type(record).__slots__
    }


# By annotation, so that a field is declared once.
_CHECKS: dict[object, expect.Check] = {
    "int": expect.count,
    "float": expect.number,
    "bool": expect.boolean,
    "object": expect.opaque,
    "list[object]": lambda value, path: expect.array(expect.opaque(value, path), path),
    "Mapping[object, object]": expect.opaque_mapping,
    "PrefixCacheStats": lambda value, path: record_from_wire(PrefixCacheStats, value, path),
}


def record_from_wire(kind: type[_Record], value: object, path: str) -> _Record:
    """Parse the map of a record; missing keys are defaults and unknown ones are ignored. Raises
    WireError."""
    entries = expect.mapping(value, path)
    fields = {
        field.name: _CHECKS[field.type](entries[field.name], f"{path}.{field.name}")
        for field in dataclasses.fields(cast(Any, kind))
        if field.name in entries
    }
    return kind(**fields)
