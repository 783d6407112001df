"""Byte-exact agreement with vLLM 0.32: every golden frame decodes to what it means and encodes to
the same bytes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from ipc.abort import Abort, encode_abort
from ipc.codec import unpack
from ipc.errors import WireError
from ipc.frames import decode_input
from ipc.handshake import Hello, Init, Ready, Registration
from ipc.output import (
    EngineCoreEvent,
    EngineCoreOutput,
    EngineCoreOutputs,
    EventType,
    FinishReason,
    LogprobsLists,
    PrefillStats,
    SchedulerStats,
    decode_outputs,
    encode_outputs,
)
from ipc.request import EngineCoreRequest, OutputKind, SamplingParams, encode_add
from ipc.utility import UtilityCall, UtilityReply, encode_utility
from tests.support.golden_frames import GOLDEN, WHOLE_GOLDEN

HANDSHAKE: dict[str, type[Hello] | type[Ready] | type[Init] | type[Registration]] = {
    "HELLO": Hello,
    "READY": Ready,
    "INIT dp1": Init,
    "INIT moe dp2": Init,
    "READYRESP": Registration,
}
SAMPLING = ("SP default", "SP custom", "SP rich")
REFUSED = ("OUT empty",)
"""Fatal for a vllm-rs front end, so it is decoded but never written."""
CUT_SHORT = ("OUT first token full",)
NOT_MODELLED = (
    "START_DP_WAVE payload",
    "START_DP_WAVE none",
    "FRONT PUB",
    "FRONT PUB state",
    "FRONT first req",
)
"""Between vLLM's coordinator and its peers; Caesura has no coordinator."""

INPUTS = tuple(name for name in GOLDEN if name.split()[0] in ("ADD", "ABORT", "UTIL"))
OUTPUTS = tuple(
    name for name in GOLDEN if name.startswith("OUT ") and name not in REFUSED + CUT_SHORT
)


def test_every_golden_message_is_checked_or_named_as_not_modelled() -> None:
    checked = (*HANDSHAKE, *SAMPLING, *INPUTS, *OUTPUTS, *REFUSED, *CUT_SHORT)
    assert sorted((*checked, *NOT_MODELLED)) == sorted(GOLDEN)


# ── re-encoding what was decoded ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", HANDSHAKE)
def test_a_golden_handshake_map_is_written_as_it_was_read(name: str) -> None:
    (payload,) = WHOLE_GOLDEN[name]
    assert HANDSHAKE[name].decode(payload).encode() == payload


@pytest.mark.parametrize("name", SAMPLING)
def test_golden_sampling_params_are_written_as_they_were_read(name: str) -> None:
    (payload,) = WHOLE_GOLDEN[name]
    assert SamplingParams.from_wire(unpack(payload)).to_wire() == payload


@pytest.mark.parametrize("name", INPUTS)
def test_a_golden_input_is_written_as_it_was_read(name: str) -> None:
    frames = input_frames(name)
    assert encode_input(decode_input(frames)) == frames


def input_frames(name: str) -> list[bytes]:
    kind = {"ADD": b"\x00", "ABORT": b"\x01", "UTIL": b"\x03"}[name.split()[0]]
    return [kind, *WHOLE_GOLDEN[name]]


def encode_input(message: EngineCoreRequest | Abort | UtilityCall) -> list[bytes]:
    match message:
        case EngineCoreRequest():
            return encode_add(message)
        case Abort(request_ids):
            return encode_abort(request_ids)
        case UtilityCall():
            return encode_utility(message)


@pytest.mark.parametrize("name", OUTPUTS)
def test_golden_outputs_are_written_as_they_were_read(name: str) -> None:
    frames = WHOLE_GOLDEN[name]
    assert encode_outputs(decode_outputs(frames), full=True) == frames


# ── what they mean ────────────────────────────────────────────────────────────────────────────────

MINIMAL_ADD = EngineCoreRequest(
    request_id="req-1",
    prompt_token_ids=[1, 2, 3],
    sampling_params=SamplingParams(max_tokens=8),
    arrival_time=1234.5,
)

MEANINGS: dict[str, Callable[[], object]] = {
    "HELLO": lambda: Hello(local=False, headless=True),
    "READY": lambda: Ready(local=False, headless=True),
    "INIT dp1": lambda: Init(("tcp://127.0.0.1:5001",), ("tcp://127.0.0.1:5002",)),
    "INIT moe dp2": lambda: Init(
        ("tcp://127.0.0.1:5001",),
        ("tcp://127.0.0.1:5002",),
        coordinator_input="tcp://127.0.0.1:5003",
        coordinator_output="tcp://127.0.0.1:5004",
        frontend_stats_publish_address="ipc:///tmp/x",
        parallel_config={
            "data_parallel_master_ip": "127.0.0.1",
            "data_parallel_master_port": 29500,
            "_data_parallel_master_port_list": [29501],
            "_coord_store_port": 40000,
            "data_parallel_size": 2,
        },
    ),
    "READYRESP": lambda: Registration(
        max_model_len=2048,
        num_gpu_blocks=1000,
        block_size=16,
        dp_stats_address=None,
        dtype="bfloat16",
        vllm_version="0.32.0",
        world_size=1,
        data_parallel_size=1,
        tensor_parallel_size=1,
        pipeline_parallel_size=1,
        decode_context_parallel_size=1,
        data_parallel_rank=0,
        max_num_seqs=256,
        max_num_batched_tokens=2048,
        instance_id="i",
        supports_lora=False,
        max_loras=0,
    ),
    "SP default": SamplingParams,
    "SP custom": lambda: SamplingParams(
        temperature=0, stop=("\n",), ignore_eos=True, max_tokens=32
    ),
    "SP rich": lambda: SamplingParams(
        n=2,
        presence_penalty=0.1,
        frequency_penalty=0.2,
        repetition_penalty=1.1,
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        seed=7,
        stop_token_ids=(7,),
        max_tokens=None,
        min_tokens=2,
        logprobs=3,
        prompt_logprobs=2,
        output_kind=OutputKind.DELTA,
        all_stop_token_ids=frozenset({7}),
        structured_outputs={
            "json": '{"type":"object"}',
            "regex": None,
            "choice": None,
            "grammar": None,
            "json_object": None,
            "disable_any_whitespace": False,
            "disable_additional_properties": False,
            "whitespace_pattern": None,
            "structural_tag": None,
            "_backend": None,
            "_backend_was_auto": False,
        },
        logit_bias={5: 1.5},
        allowed_token_ids=(1, 2, 3),
        extra_args={"a": 1},
        bad_words=("x",),
        skip_reading_prefix_cache=True,
        thinking_token_budget=10,
        repetition_detection={"max_pattern_size": 3, "min_pattern_size": 1, "min_count": 2},
    ),
    "ADD minimal": lambda: MINIMAL_ADD,
    "ADD client1": lambda: EngineCoreRequest(
        request_id="req-1",
        prompt_token_ids=[1, 2, 3],
        sampling_params=SamplingParams(max_tokens=8),
        arrival_time=1234.5,
        client_index=1,
        priority=-3,
        external_req_id="ext",
    ),
    "ADD lora/pool": lambda: EngineCoreRequest(
        request_id="req-1",
        prompt_token_ids=[1, 2, 3],
        pooling_params=[None, None, None, None, "embed", False, None, None, None, 2],
        arrival_time=1234.5,
        lora_request=["ad", 1, "/p", None, False, False],
        client_index=1,
        priority=-3,
        external_req_id="ext",
    ),
    "ABORT": lambda: Abort(("req-1", "req-2")),
    "UTIL is_sleeping": lambda: UtilityCall(0, 11806735842304201744, "is_sleeping"),
    "UTIL pause": lambda: UtilityCall(0, 42, "pause_scheduler", ("abort", True)),
    "UTIL reset": lambda: UtilityCall(0, 43, "reset_prefix_cache", (False, False)),
    "UTIL collective": lambda: UtilityCall(0, 44, "collective_rpc", ("m", None, [], None)),
    "UTIL add_lora": lambda: UtilityCall(0, 45, "add_lora", (["ad", 1, "/p", None, False, False],)),
    "OUT one token": lambda: rows(EngineCoreOutput("req-1", [42])),
    "OUT engine1": lambda: rows(EngineCoreOutput("req-1", [42]), engine_index=1),
    "OUT finish length": lambda: rows(
        EngineCoreOutput("req-1", [42], finish_reason=FinishReason.LENGTH)
    ),
    "OUT finish stop token": lambda: rows(
        EngineCoreOutput("req-1", [42], finish_reason=FinishReason.STOP, stop_reason=2)
    ),
    "OUT abort": lambda: rows(
        EngineCoreOutput("req-1", [], finish_reason=FinishReason.ABORT),
        finished_requests=["req-1"],
    ),
    "OUT empty": lambda: EngineCoreOutputs(outputs=[], timestamp=1.5),
    "OUT stats only -1": lambda: EngineCoreOutputs(
        outputs=[],
        timestamp=1.5,
        scheduler_stats=SchedulerStats(
            num_running_reqs=2,
            num_waiting_reqs=3,
            step_counter=7,
            current_wave=1,
            kv_cache_usage=0.25,
        ),
    ),
    "OUT util ok bool": lambda: reply(UtilityReply(42, result=True)),
    "OUT util ok None": lambda: reply(UtilityReply(42)),
    "OUT util tasks": lambda: reply(UtilityReply(42, result=["generate"])),
    "OUT util set": lambda: reply(UtilityReply(42, result=[1, 2])),
    "OUT util fail": lambda: reply(UtilityReply(42, "Call to foo method failed: x")),
    "OUT wave_complete": lambda: EngineCoreOutputs(outputs=[], timestamp=1.5, wave_complete=0),
    "OUT start_wave": lambda: EngineCoreOutputs(outputs=[], timestamp=1.5, start_wave=3),
    "OUT logprobs": lambda: rows(
        EngineCoreOutput("r", [42], new_logprobs=logprobs([[42, 7, 9]], [[-0.5, -1.0, -2.0]], [1]))
    ),
    "OUT prompt logprobs": lambda: rows(
        EngineCoreOutput("r", [42], prompt_logprobs=logprobs([[42, 7]], [[-0.5, -1.0]], [1]))
    ),
    "OUT logprobs 256B -> aux": lambda: rows(
        EngineCoreOutput("r", [42], new_logprobs=logprobs([list(range(64))], [[0.0] * 64], [1]))
    ),
    "OUT int64 ranks": lambda: rows(
        EngineCoreOutput("r", [42], new_logprobs=logprobs([[42]], [[-0.5]], [1], dtype="int64"))
    ),
}


def rows(*outputs: EngineCoreOutput, **fields: object) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=list(outputs), timestamp=1.5, **fields)  # type: ignore[arg-type]


def reply(utility_reply: UtilityReply) -> EngineCoreOutputs:
    return EngineCoreOutputs(outputs=[], timestamp=1.5, utility_output=utility_reply)


def logprobs(
    token_ids: list[list[int]], values: list[list[float]], ranks: list[int], dtype: str = "int32"
) -> LogprobsLists:
    return LogprobsLists(
        np.array(token_ids, dtype), np.array(values, np.float32), np.array(ranks, dtype)
    )


def decode_golden(name: str) -> object:
    frames = WHOLE_GOLDEN[name]
    if name in HANDSHAKE:
        return HANDSHAKE[name].decode(frames[0])
    if name in SAMPLING:
        return SamplingParams.from_wire(unpack(frames[0]))
    if name in INPUTS:
        return decode_input(input_frames(name))
    return decode_outputs(frames)


@pytest.mark.parametrize("name", MEANINGS)
def test_a_golden_message_means_what_it_says(name: str) -> None:
    assert decode_golden(name) == MEANINGS[name]()


@pytest.mark.parametrize("name", [name for name in MEANINGS if name in OUTPUTS])
def test_outputs_made_by_hand_are_written_as_vllm_writes_them(name: str) -> None:
    message = MEANINGS[name]()
    assert isinstance(message, EngineCoreOutputs)
    assert encode_outputs(message, full=True) == WHOLE_GOLDEN[name]


def test_a_first_output_with_everything_is_written_as_vllm_writes_it() -> None:
    message = rows(
        EngineCoreOutput(
            "req-1",
            [42],
            events=(
                EngineCoreEvent(EventType.QUEUED, 1.0),
                EngineCoreEvent(EventType.SCHEDULED, 1.25),
            ),
            prefill_stats=PrefillStats(num_prompt_tokens=3, num_computed_tokens=3),
        ),
        scheduler_stats=SchedulerStats(num_running_reqs=1),
        weight_version="default",
    )
    (beginning,) = GOLDEN["OUT first token full"]
    (frame,) = encode_outputs(message, full=True)
    assert frame.startswith(beginning.content)
    assert len(frame) == beginning.num_bytes
    assert decode_outputs([frame]) == message


def test_an_empty_outputs_frame_is_read_but_never_written() -> None:
    message = decode_outputs(WHOLE_GOLDEN["OUT empty"])
    with pytest.raises(WireError, match="has none of"):
        encode_outputs(message, full=True)


def test_a_registration_of_ours_adds_one_key_to_vllms() -> None:
    golden = unpack(WHOLE_GOLDEN["READYRESP"][0])
    registration = Registration.decode(WHOLE_GOLDEN["READYRESP"][0])
    assert registration.caesura_protocol is None
    fields = {name: getattr(registration, name) for name in registration.__slots__}
    ours = Registration(**(fields | {"caesura_protocol": 1}))
    assert isinstance(golden, dict)
    assert unpack(ours.encode()) == golden | {"caesura": {"protocol": 1}}
    assert Registration.decode(ours.encode()) == ours
