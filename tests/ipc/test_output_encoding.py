"""Outputs frames: the compact shape, the shapes that no peer may get, and strict decoding."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from ipc.codec import pack, unpack
from ipc.errors import WireError
from ipc.output import (
    ENGINE_CORE_DEAD,
    EngineCoreEvent,
    EngineCoreOutput,
    EngineCoreOutputs,
    EventType,
    FinishReason,
    LogprobsLists,
    OutputError,
    PrefillStats,
    SchedulerStats,
    StepOutputs,
    decode_outputs,
    encode_outputs,
    is_dead,
)
from ipc.utility import UtilityReply


def compact(**fields: Any) -> object:
    """The decoded body of a compact frame."""
    (body,) = encode_outputs(EngineCoreOutputs(timestamp=1.5, **fields))
    return unpack(body)


def compact_row(output: EngineCoreOutput) -> object:
    body = compact(outputs=[output])
    assert isinstance(body, list)
    return body[1][0]


# ── the compact shape ─────────────────────────────────────────────────────────────────────────────


def test_a_streaming_output_is_its_id_and_its_tokens() -> None:
    assert compact(outputs=[EngineCoreOutput("r", [42])]) == [0, [["r", [42]]], None, 1.5]


@pytest.mark.parametrize("full", [False, True])
def test_columns_of_a_step_are_written_as_their_rows_would_be(full: bool) -> None:
    others = [EngineCoreOutput("end", [7], finish_reason=FinishReason.LENGTH)]
    step = StepOutputs(["a", "b"], [5, 2**31], others)
    rows = [*others, EngineCoreOutput("a", (5,)), EngineCoreOutput("b", (2**31,))]
    assert (list(step), len(step), step[0], step[1:]) == (rows, 3, rows[0], rows[1:])
    of_step, of_rows = (EngineCoreOutputs(outputs=each, timestamp=1.5) for each in (step, rows))
    assert encode_outputs(of_step, full=full) == encode_outputs(of_rows, full=full)


def test_a_finish_is_written_up_to_its_reason() -> None:
    finish = EngineCoreOutput("r", [42], finish_reason=FinishReason.LENGTH)
    assert compact_row(finish) == ["r", [42], None, None, None, 1]
    stop = finish._replace(finish_reason=FinishReason.STOP, stop_reason=2)
    assert compact_row(stop) == ["r", [42], None, None, None, 0, 2]
    text_stop = finish._replace(finish_reason=FinishReason.STOP, stop_reason="\n")
    assert compact_row(text_stop) == ["r", [42], None, None, None, 0, "\n"]


def test_a_first_output_is_written_up_to_its_prefill_stats() -> None:
    row = compact_row(
        EngineCoreOutput(
            "r",
            [42],
            events=[EngineCoreEvent(EventType.SCHEDULED, 0.25)],
            prefill_stats=PrefillStats(num_prompt_tokens=3, num_cached_tokens=1),
        )
    )
    assert isinstance(row, list)
    assert len(row) == 12
    assert row[7] == [{"type": 2, "timestamp": 0.25}]
    assert row[8:11] == [None] * 3
    assert row[11]["num_prompt_tokens"] == 3


def test_an_error_fills_the_positions_before_it_with_no_nil_for_a_number() -> None:
    row = compact_row(
        EngineCoreOutput(
            "r",
            finish_reason=FinishReason.ERROR,
            error=OutputError("engine_paused", "the engine is paused", retryable=True),
        )
    )
    error = {"code": "engine_paused", "message": "the engine is paused", "retryable": True}
    assert row == ["r", [], None, None, None, 3, *[None] * 7, 0, *[None] * 4, error]


def test_an_error_makes_a_full_row_longer_than_vllm_032_writes_it() -> None:
    message = EngineCoreOutputs(
        outputs=[EngineCoreOutput("r", error=OutputError("c", "m")), EngineCoreOutput("s")]
    )
    body = unpack(encode_outputs(message, full=True)[0])
    assert isinstance(body, list)
    assert [len(row) for row in body[1]] == [19, 18]


def test_rows_of_every_shape_may_share_a_frame() -> None:
    outputs = [
        EngineCoreOutput("a", [1]),
        EngineCoreOutput("b", [2], finish_reason=FinishReason.STOP),
        EngineCoreOutput("c", [3, 4]),
        EngineCoreOutput("d"),
        EngineCoreOutput("e", num_nans_in_logits=2),
    ]
    message = EngineCoreOutputs(outputs=outputs)
    decoded = decode_outputs(encode_outputs(message))
    assert [tuple(row.new_token_ids) for row in decoded.outputs] == [(1,), (2,), (3, 4), (), ()]
    assert [row.finish_reason for row in decoded.outputs] == [None, 0, None, None, None]
    assert [row.num_nans_in_logits for row in decoded.outputs] == [0, 0, 0, 0, 2]


def test_a_weight_version_makes_the_outer_array_nine_long_and_nothing_makes_it_longer() -> None:
    body = compact(outputs=[EngineCoreOutput("r", [1])], weight_version="v2")
    assert body == [0, [["r", [1]]], None, 1.5, None, None, None, None, "v2"]


def test_the_timestamp_is_a_float_even_if_it_was_given_as_an_integer() -> None:
    (body,) = encode_outputs(EngineCoreOutputs(outputs=[EngineCoreOutput("r")], timestamp=2))
    assert body.endswith(b"\xcb\x40\x00\x00\x00\x00\x00\x00\x00")


def test_stats_are_written_whole() -> None:
    body = compact(scheduler_stats=SchedulerStats(num_running_reqs=1))
    assert isinstance(body, list)
    assert body[1] == []
    assert len(body[2]) == 18
    assert set(body[2]["prefix_cache_stats"]) >= {"reset", "requests", "queries", "hits"}
    assert body[2]["kv_cache_eviction_events"] == []


def test_large_logprobs_travel_in_their_own_frames_in_order() -> None:
    def logprobs(first: int) -> LogprobsLists:
        token_ids = np.arange(first, first + 100, dtype=np.int32).reshape(1, 100)
        return LogprobsLists(token_ids, -token_ids.astype(np.float32), np.array([1]))

    outputs = [EngineCoreOutput(name, [1], new_logprobs=logprobs(ord(name))) for name in "ab"]
    frames = encode_outputs(EngineCoreOutputs(outputs=outputs))
    assert [len(frame) for frame in frames[1:]] == [400] * 4
    assert decode_outputs(frames).outputs == outputs
    with pytest.raises(WireError, match="auxiliary frame"):
        decode_outputs(frames[:-1])


# ── frames that would kill a peer ─────────────────────────────────────────────────────────────────

BATCH = {"outputs": [EngineCoreOutput("r", [1])]}
STATS = {"scheduler_stats": SchedulerStats()}
FINISHED = {"finished_requests": ["r"]}
REPLY = {"utility_output": UtilityReply(1)}
WAVE = {"wave_complete": 0}


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("fields", [{}, {"weight_version": "v"}, {"engine_index": 1}])
def test_an_empty_frame_is_never_written(fields: dict[str, Any], full: bool) -> None:
    with pytest.raises(WireError, match="has none of"):
        encode_outputs(EngineCoreOutputs(**fields), full=full)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(
    "fields",
    [REPLY | BATCH, REPLY | STATS, REPLY | FINISHED, REPLY | WAVE, WAVE | BATCH, WAVE | STATS],
)
def test_a_reply_or_a_wave_is_never_mixed_with_anything(fields: dict[str, Any], full: bool) -> None:
    with pytest.raises(WireError, match="mixes"):
        encode_outputs(EngineCoreOutputs(**fields), full=full)


@pytest.mark.parametrize("fields", [BATCH, STATS, FINISHED, {"finished_requests": []}, REPLY, WAVE])
def test_one_kind_of_content_is_enough(fields: dict[str, Any]) -> None:
    assert len(encode_outputs(EngineCoreOutputs(**fields))) == 1


def test_only_the_death_notice_alone_is_one() -> None:
    assert is_dead([ENGINE_CORE_DEAD])
    assert is_dead([memoryview(b"ENGINE_CORE_DEAD")])
    assert not is_dead([ENGINE_CORE_DEAD, b""])
    assert not is_dead([])
    assert not is_dead([b"ENGINE_CORE_DEAD "])
    with pytest.raises(WireError):
        decode_outputs([ENGINE_CORE_DEAD])


# ── decoding ──────────────────────────────────────────────────────────────────────────────────────


def test_short_and_long_outer_arrays_are_accepted() -> None:
    assert decode_outputs([pack([])]) == EngineCoreOutputs(outputs=[])
    assert decode_outputs([pack([2, [["r", [1]]]])]).engine_index == 2
    long = decode_outputs([pack([0, [], None, 1, None, None, None, None, "v", {"new": 1}, 7])])
    assert long.weight_version == "v"
    assert type(long.timestamp) is float


def test_a_row_may_have_any_length_and_positions_that_are_not_known() -> None:
    row: list[object] = ["r", [1], *[None] * 11, 0, *[None] * 5, "new", {"newer": 1}]
    for length in range(2, len(row) + 1):
        assert decode_outputs([pack([0, [row[:length]]])]).outputs == [EngineCoreOutput("r", [1])]


def test_an_error_defaults_to_not_retryable_and_its_unknown_keys_are_ignored() -> None:
    error = {"code": "c", "message": "m", "new": 1}
    (output,) = decode_outputs([pack(row_with(18, error))]).outputs
    assert output.error == OutputError("c", "m", retryable=False)


def row_with(position: int, value: object) -> list[object]:
    row: list[object] = ["r", [1], *[None] * 11, 0, *[None] * 5]
    row[position] = value
    return [0, [row], None, 1.5]


@pytest.mark.parametrize(
    ("body", "path"),
    [
        (None, "outputs: expected an array"),
        ({}, "outputs: expected an array"),
        ([-1], "outputs.engine_index"),
        ([0, None], "outputs.outputs"),
        ([0, [None]], r"outputs.outputs\[0\]"),
        ([0, [["r", [1]], ["s"]]], r"outputs.outputs\[1\]: expected an array of at least 2"),
        ([0, [{"r": 1, "s": 2}]], r"outputs.outputs\[0\]"),
        ([0, [[5, [1]]]], r"outputs\[0\].request_id"),
        ([0, [["r", 1]]], r"outputs\[0\].new_token_ids"),
        ([0, [["r", [True]]]], r"new_token_ids\[0\]"),
        ([0, [["r", [-1]]]], r"new_token_ids\[0\]"),
        ([0, [["r", [1.0]]]], r"new_token_ids\[0\]"),
        ([0, [["r", [2**31]]]], r"new_token_ids\[0\]"),
        ([0, [], None, None], "outputs.timestamp"),
        ([0, [], None, math.nan], "outputs.timestamp"),
        ([0, [], []], "outputs.scheduler_stats"),
        ([0, [], {"num_running_reqs": None}], "outputs.scheduler_stats.num_running_reqs"),
        ([0, [], {"prefix_cache_stats": {"hits": "x"}}], "prefix_cache_stats.hits"),
        ([0, [], None, 1.5, []], "outputs.utility_output"),
        ([0, [], None, 1.5, [None]], "outputs.utility_output.call_id"),
        ([0, [], None, 1.5, [2**64 - 1, 5]], "outputs.utility_output.failure_message"),
        ([0, [], None, 1.5, [1, None, [None]]], "outputs.utility_output.result"),
        ([0, [], None, 1.5, None, [5]], r"outputs.finished_requests\[0\]"),
        ([0, [], None, 1.5, None, None, -1], "outputs.wave_complete"),
        ([0, [], None, 1.5, None, None, None, "x"], "outputs.start_wave"),
        ([0, [], None, 1.5, None, None, None, None, 8], "outputs.weight_version"),
        (row_with(0, None), "request_id"),
        (row_with(1, None), "new_token_ids"),
        (row_with(2, []), "new_logprobs"),
        (row_with(5, 5), "finish_reason"),
        (row_with(5, -1), "finish_reason"),
        (row_with(5, True), "finish_reason"),
        (row_with(6, 1.5), "stop_reason"),
        (row_with(6, True), "stop_reason"),
        (row_with(7, [[1, 0.5]]), r"events\[0\]"),
        (row_with(7, [{"type": 9, "timestamp": 0.5}]), r"events\[0\].type"),
        (row_with(7, [{"type": 1}]), r"events\[0\].timestamp"),
        (row_with(11, []), "prefill_stats"),
        (row_with(13, None), "num_nans_in_logits"),
        (row_with(13, -1), "num_nans_in_logits"),
        (row_with(18, {"code": "c"}), "error.message"),
        (row_with(18, {"code": "c", "message": "m", "retryable": None}), "error.retryable"),
    ],
)
def test_a_bad_frame_is_refused_by_path(body: object, path: str) -> None:
    with pytest.raises(WireError, match=path):
        decode_outputs([pack(body)])


def test_no_frames_are_refused() -> None:
    with pytest.raises(WireError, match="no frames"):
        decode_outputs([])


@pytest.mark.parametrize(
    ("token_ids", "logprobs", "ranks"),
    [
        (np.zeros(2, "i4"), np.zeros(2, "f4"), np.zeros(2, "i4")),
        (np.zeros((1, 2), "i4"), np.zeros((1, 3), "f4"), np.zeros(1, "i4")),
        (np.zeros((1, 2), "i4"), np.zeros((1, 2), "f4"), np.zeros(2, "i4")),
        (np.zeros((1, 2), "f4"), np.zeros((1, 2), "f4"), np.zeros(1, "i4")),
        (np.zeros((1, 2), "i4"), np.zeros((1, 2), "i4"), np.zeros(1, "i4")),
    ],
    ids=["one dimension", "unequal widths", "too many ranks", "float ids", "integer logprobs"],
)
def test_logprobs_that_do_not_belong_together_are_refused(
    token_ids: Any, logprobs: Any, ranks: Any
) -> None:
    mismatched = EngineCoreOutput("r", [1], new_logprobs=LogprobsLists(token_ids, logprobs, ranks))
    frames = encode_outputs(EngineCoreOutputs(outputs=[mismatched]))
    with pytest.raises(WireError, match="new_logprobs: expected"):
        decode_outputs(frames)


def test_a_reply_without_an_envelope_is_void() -> None:
    for reply in ([7], [7, None], [7, None, None], [7, None, [None, None], "new"]):
        assert decode_outputs([pack([0, [], None, 1.5, reply])]).utility_output == UtilityReply(7)
