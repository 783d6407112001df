"""The outputs frame: what an engine sends a front end, an array of up to 9 positions.

Two shapes are written. The compact one, the default, cuts trailing defaults: `[request_id,
token_ids]` for a row that only streams, up to position 6 for one that finishes, 11 for a first one,
18 for one with an error. The full one is what vLLM writes, byte for byte. Invariants of both: the
timestamp is a float; nil never stands for a number; a frame is never empty and never mixes a
utility reply or a wave with anything (each of these kills a vllm-rs front end for good).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple, overload

from ipc import expect
from ipc.codec import Frames, pack, unpack
from ipc.errors import WireError, mismatch
from ipc.logprobs import LogprobsLists as LogprobsLists
from ipc.logprobs import logprobs_from_wire, logprobs_to_wire, prompt_logprobs_to_wire
from ipc.stats import PrefillStats as PrefillStats
from ipc.stats import PrefixCacheStats as PrefixCacheStats
from ipc.stats import SchedulerStats as SchedulerStats
from ipc.stats import record_from_wire, record_to_wire
from ipc.utility import UtilityReply, reply_from_wire, reply_to_wire

ENGINE_CORE_DEAD = b"ENGINE_CORE_DEAD"
"""The only frame of an engine's last message, on every output socket, when its step loop raised."""


class FinishReason(IntEnum):
    """Why a request ended."""

    STOP = 0
    LENGTH = 1
    ABORT = 2
    ERROR = 3
    REPETITION = 4
    """Only from vLLM's engines."""


class EventType(IntEnum):
    """A change of a request's stage in the engine."""

    QUEUED = 1
    SCHEDULED = 2
    PREEMPTED = 3


@dataclass(frozen=True, slots=True)
class EngineCoreEvent:
    """A request changed its stage; `timestamp` is of the engine's monotonic clock, in seconds."""

    type: EventType
    timestamp: float


@dataclass(frozen=True, slots=True)
class OutputError:
    """Why a request ended with FinishReason.ERROR. vllm-rs makes `engine_paused` a 503 and
    `validation_error` a 400."""

    code: str
    message: str
    retryable: bool = False


class EngineCoreOutput(NamedTuple):
    """News of one request. A named tuple and no dataclass: hundreds a step, and eight times cheaper
    to make.

    Fields are the positions of the wire; those typed `object` are carried as they came.
    """

    request_id: str
    new_token_ids: Sequence[int] = ()
    new_logprobs: LogprobsLists | None = None
    """As many positions as new tokens."""
    prompt_logprobs: LogprobsLists | None = None
    pooling_output: object = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token's id or the stop string; None for EOS."""
    events: Sequence[EngineCoreEvent] | None = None
    kv_transfer_params: object = None
    ec_transfer_params: object = None
    trace_headers: object = None
    prefill_stats: PrefillStats | None = None
    routed_experts: object = None
    num_nans_in_logits: int = 0
    mm_cache_miss_hashes: object = None
    new_sampling_mask: object = None
    spec_decode_metrics: object = None
    prompt_token_id_logprobs: object = None
    error: OutputError | None = None


class StepOutputs(Sequence[EngineCoreOutput]):
    """A step's outputs: some of any kind, then those that stream one token and nothing else, as two
    columns. Of these there are hundreds, and they go to bytes without an object for each.
    """

    __slots__ = ("others", "request_ids", "token_ids")

    def __init__(
        self,
        request_ids: Sequence[str],
        token_ids: Sequence[int],
        others: Sequence[EngineCoreOutput] = (),
    ) -> None:
        self.request_ids, self.token_ids, self.others = request_ids, token_ids, others

    def __len__(self) -> int:
        return len(self.request_ids) + len(self.others)

    @overload
    def __getitem__(self, index: int) -> EngineCoreOutput: ...
    @overload
    def __getitem__(self, index: slice) -> list[EngineCoreOutput]: ...
    def __getitem__(self, index: int | slice) -> EngineCoreOutput | list[EngineCoreOutput]:
        return [*self][index]

    def __iter__(self) -> Iterator[EngineCoreOutput]:
        yield from self.others
        for request_id, token_id in zip(self.request_ids, self.token_ids, strict=True):
            yield EngineCoreOutput(request_id, (token_id,))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineCoreOutputs:
    """One message to one front end: outputs of a step, or a utility's reply, or (to a coordinator)
    a wave's change."""

    engine_index: int = 0
    outputs: Sequence[EngineCoreOutput] = ()
    scheduler_stats: SchedulerStats | None = None
    timestamp: float = 0.0
    """The engine's monotonic clock, in seconds."""
    utility_output: UtilityReply | None = None
    finished_requests: Sequence[str] | None = None
    """Ids that ended and hold no blocks any more: vLLM's data-parallel balancer needs them, and
    ours measures the way from a hang-up to freed blocks by them. A terminal output of such an id
    stands in this frame or an earlier one (else a vllm-rs front end fails the stream)."""
    wave_complete: int | None = None
    start_wave: int | None = None
    weight_version: str | None = None


_STREAMING_TAIL = tuple(EngineCoreOutput("")[2:])
_STREAMING_TAIL_ENTRIES = list(_STREAMING_TAIL)
_NUM_POSITIONS_OF_VLLM_032 = 18


def is_dead(frames: Frames) -> bool:
    """Whether a message is the engine's death notice."""
    return len(frames) == 1 and frames[0] == ENGINE_CORE_DEAD


def encode_outputs(outputs: EngineCoreOutputs, *, full: bool = False) -> list[bytes]:
    """Frames of one message: the body, then the data of large arrays. Raises WireError for a
    message no peer may get."""
    _refuse_fatal_shapes(outputs)
    aux: list[bytes] = []
    step = outputs.outputs
    if isinstance(step, StepOutputs) and not full:
        rows: list[Sequence[object]] = [_row_to_wire(output, aux, full) for output in step.others]
        rows += zip(step.request_ids, zip(step.token_ids, strict=True), strict=True)
    else:
        rows = [_row_to_wire(output, aux, full) for output in step]
    stats, reply = outputs.scheduler_stats, outputs.utility_output
    body: list[object] = [
        outputs.engine_index,
        rows,
        None if stats is None else record_to_wire(stats),
        float(outputs.timestamp),
        None if reply is None else reply_to_wire(reply),
        None if outputs.finished_requests is None else list(outputs.finished_requests),
        outputs.wave_complete,
        outputs.start_wave,
        outputs.weight_version,
    ]
    while not full and body[-1] is None:
        body.pop()
    return [pack(body), *aux]


def _refuse_fatal_shapes(outputs: EngineCoreOutputs) -> None:
    has_batch = (
        bool(outputs.outputs)
        or outputs.scheduler_stats is not None
        or outputs.finished_requests is not None
    )
    has_wave = outputs.wave_complete is not None or outputs.start_wave is not None
    num_kinds = has_batch + has_wave + (outputs.utility_output is not None)
    if num_kinds != 1:
        what = "mixes" if num_kinds else "has none of"
        raise WireError(
            f"outputs: the frame {what} a batch of requests, a utility reply and a wave; "
            "send exactly one of them"
        )


def _row_to_wire(output: EngineCoreOutput, aux: list[bytes], full: bool) -> Sequence[object]:
    if not full and output[2:] == _STREAMING_TAIL:
        return output[:2]
    row: list[object] = list(output)
    if output.new_logprobs is not None:
        row[2] = logprobs_to_wire(output.new_logprobs, aux)
    if output.prompt_logprobs is not None:
        row[3] = prompt_logprobs_to_wire(output.prompt_logprobs, aux)
    if output.events is not None:
        row[7] = [{"type": event.type, "timestamp": event.timestamp} for event in output.events]
    if output.prefill_stats is not None:
        row[11] = record_to_wire(output.prefill_stats)
    if output.error is not None:
        row[18] = record_to_wire(output.error)
        return row
    if full:
        return row[:_NUM_POSITIONS_OF_VLLM_032]
    length = len(row)
    while length > 2 and row[length - 1] == _STREAMING_TAIL[length - 3]:
        length -= 1
    return row[:length]


def decode_outputs(frames: Frames) -> EngineCoreOutputs:
    """Parse a message; missing trailing positions are defaults and unknown ones are ignored. Raises
    WireError."""
    if not frames:
        raise WireError("outputs: the message has no frames")
    entries = expect.array(unpack(frames[0]), "outputs")
    defaults: list[object] = [0, [], None, 0.0, None, None, None, None, None]
    index, rows, stats, timestamp, reply, finished, wave_complete, start_wave, version = (
        entries[:9] + defaults[len(entries) :]
    )
    return EngineCoreOutputs(
        engine_index=expect.count(index, "outputs.engine_index"),
        outputs=_rows_from_wire(expect.array(rows, "outputs.outputs"), frames),
        scheduler_stats=None
        if stats is None
        else record_from_wire(SchedulerStats, stats, "outputs.scheduler_stats"),
        timestamp=expect.number(timestamp, "outputs.timestamp"),
        utility_output=expect.optional(reply_from_wire, reply, "outputs.utility_output"),
        finished_requests=expect.optional(expect.texts, finished, "outputs.finished_requests"),
        wave_complete=expect.optional(expect.count, wave_complete, "outputs.wave_complete"),
        start_wave=expect.optional(expect.count, start_wave, "outputs.start_wave"),
        weight_version=expect.optional(expect.text, version, "outputs.weight_version"),
    )


def _rows_from_wire(rows: list[object], frames: Frames) -> list[EngineCoreOutput]:
    outputs: list[EngineCoreOutput] = []
    append, make, output_type = outputs.append, tuple.__new__, EngineCoreOutput
    tail, max_token_id = _STREAMING_TAIL, expect.MAX_TOKEN_ID
    for index, row in enumerate(rows):
        # Nearly every row only streams one token; the general path would cost ten times as much.
        if type(row) is list and (len(row) == 2 or _is_streaming(row)):
            request_id, token_ids = row[0], row[1]
            if type(request_id) is str and type(token_ids) is list and len(token_ids) == 1:
                token_id = token_ids[0]
                if type(token_id) is int and 0 <= token_id <= max_token_id:
                    append(make(output_type, (request_id, token_ids) + tail))  # noqa: RUF005 (faster)
                    continue
        append(_row_from_wire(row, frames, f"outputs.outputs[{index}]"))
    return outputs


def _is_streaming(row: list[object]) -> bool:
    """Whether a row written in full has tokens and nothing else."""
    return len(row) > 2 and row[2:] == _STREAMING_TAIL_ENTRIES[: len(row) - 2]


def _row_from_wire(value: object, frames: Frames, path: str) -> EngineCoreOutput:
    entries = expect.array(value, path, 2)
    fields: list[object] = []
    for name, entry in zip(EngineCoreOutput._fields, entries, strict=False):
        if entry is None and name not in _NEVER_NIL:
            fields.append(None)
        elif name in _ARRAYS:
            fields.append(logprobs_from_wire(entry, frames, f"{path}.{name}"))
        else:
            fields.append(_CHECKS.get(name, expect.opaque)(entry, f"{path}.{name}"))
    return EngineCoreOutput(*fields)  # type: ignore[arg-type]  # the checks return each field's type


def _finish_reason(value: object, path: str) -> FinishReason:
    return FinishReason(expect.integer(value, path, 0, max(FinishReason)))


def _stop_reason(value: object, path: str) -> int | str:
    if isinstance(value, str):
        return value
    if type(value) is int:
        return value
    raise mismatch(path, value, "a token id or a stop string")


def _events(value: object, path: str) -> tuple[EngineCoreEvent, ...]:
    return tuple(
        _event(entry, f"{path}[{index}]") for index, entry in enumerate(expect.array(value, path))
    )


def _event(value: object, path: str) -> EngineCoreEvent:
    fields = expect.mapping(value, path)
    kind = expect.integer(fields.get("type"), f"{path}.type", min(EventType), max(EventType))
    return EngineCoreEvent(
        EventType(kind), expect.number(fields.get("timestamp"), f"{path}.timestamp")
    )


def _error(value: object, path: str) -> OutputError:
    fields = expect.mapping(value, path)
    return OutputError(
        expect.text(fields.get("code"), f"{path}.code"),
        expect.text(fields.get("message"), f"{path}.message"),
        expect.boolean(fields.get("retryable", False), f"{path}.retryable"),
    )


_NEVER_NIL = ("request_id", "new_token_ids", "num_nans_in_logits")
_ARRAYS = ("new_logprobs", "prompt_logprobs")
_CHECKS: dict[str, expect.Check] = {
    "request_id": expect.text,
    "new_token_ids": expect.token_ids,
    "finish_reason": _finish_reason,
    "stop_reason": _stop_reason,
    "events": _events,
    "prefill_stats": lambda value, path: record_from_wire(PrefillStats, value, path),
    "num_nans_in_logits": expect.count,
    "error": _error,
}
