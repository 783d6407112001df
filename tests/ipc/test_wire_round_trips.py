"""Whatever a message holds, decoding gives back what was encoded."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from ipc import expect
from ipc.abort import Abort, encode_abort
from ipc.codec import pack, unpack
from ipc.frames import decode_input
from ipc.handshake import Hello, Init, Ready, Registration, decode_handshake
from ipc.lifecycle import AbortReceipt, EngineStatus, RequestReceipt
from ipc.output import (
    EngineCoreEvent,
    EngineCoreOutput,
    EngineCoreOutputs,
    EventType,
    FinishReason,
    LogprobsLists,
    OutputError,
    PrefillStats,
    PrefixCacheStats,
    SchedulerStats,
    decode_outputs,
    encode_outputs,
)
from ipc.request import EngineCoreRequest, OutputKind, SamplingParams, encode_add
from ipc.utility import UtilityCall, UtilityReply, encode_utility

unhurried = settings(deadline=None)

text = st.text(max_size=20)
name = st.text(min_size=1, max_size=20)
counts = st.integers(0, 2**63 - 1)
integers = st.integers(-(2**63), 2**63 - 1)
call_ids = st.integers(-(2**63), 2**64 - 1)
numbers = st.floats(allow_nan=False, allow_infinity=False)
token_ids = st.lists(st.integers(0, expect.MAX_TOKEN_ID), max_size=8)
plain = st.recursive(
    st.none() | st.booleans() | call_ids | numbers | text | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text | integers, inner, max_size=3),
    max_leaves=8,
)
plain_maps = st.dictionaries(text, plain, max_size=3)


def nullable(strategy: st.SearchStrategy[object]) -> st.SearchStrategy[object]:
    return st.none() | strategy


sampling_params = st.builds(
    SamplingParams,
    n=st.integers(1, 9),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    repetition_penalty=st.floats(0.01, 10),
    temperature=st.floats(0, 10),
    watermarking=nullable(st.booleans()),
    top_p=st.floats(0.01, 1),
    top_k=st.integers(-1, 100),
    min_p=st.floats(0, 1),
    seed=nullable(integers),
    stop=st.lists(name, max_size=3).map(tuple),
    stop_token_ids=token_ids.map(tuple),
    ignore_eos=st.booleans(),
    max_tokens=nullable(st.integers(10, 2**31)),
    min_tokens=st.integers(0, 10),
    logprobs=nullable(st.integers(-1, 20)),
    prompt_logprobs=nullable(st.integers(-1, 20)),
    output_kind=st.sampled_from(OutputKind),
    stream_interval=nullable(st.integers(1, 10)),
    eos_token_id=nullable(st.integers(0, expect.MAX_TOKEN_ID)),
    all_stop_token_ids=token_ids.map(frozenset),
    structured_outputs=nullable(plain_maps),
    logit_bias=nullable(st.dictionaries(st.integers(0, expect.MAX_TOKEN_ID), numbers, max_size=4)),
    allowed_token_ids=nullable(token_ids.map(tuple)),
    extra_args=nullable(plain_maps),
    bad_words=st.lists(name, max_size=3).map(tuple),
    bad_words_token_ids=nullable(st.lists(token_ids, max_size=2)),
    skip_reading_prefix_cache=nullable(st.booleans()),
)

requests = st.builds(
    EngineCoreRequest,
    request_id=name,
    prompt_token_ids=nullable(token_ids),
    mm_features=plain,
    sampling_params=nullable(sampling_params),
    pooling_params=plain,
    arrival_time=numbers,
    lora_request=plain,
    cache_salt=nullable(text),
    data_parallel_rank=nullable(counts),
    prompt_embeds=plain,
    prompt_is_token_ids=plain,
    client_index=counts,
    current_wave=counts,
    priority=integers,
    trace_headers=nullable(st.dictionaries(text, text, max_size=3)),
    resumable=st.booleans(),
    external_req_id=nullable(text),
    reasoning_ended=nullable(st.booleans()),
    reasoning_parser_kwargs=nullable(plain_maps),
    abort_immediately=st.booleans(),
    session_id=nullable(text),
    kv_hints=plain,
)


@st.composite
def logprobs_lists(draw: st.DrawFn) -> LogprobsLists:
    """From none to enough entries for frames of their own."""
    shape = draw(st.tuples(st.integers(0, 3), st.integers(1, 90)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    return LogprobsLists(
        rng.integers(0, 9, shape, draw(st.sampled_from(["int32", "int64"]))),
        -rng.random(shape, draw(st.sampled_from(["float32", "float64"]))),
        rng.integers(1, 9, shape[0]),
    )


outputs = st.builds(
    EngineCoreOutput,
    request_id=text,
    new_token_ids=token_ids,
    new_logprobs=nullable(logprobs_lists()),
    prompt_logprobs=nullable(logprobs_lists()),
    pooling_output=plain,
    finish_reason=nullable(st.sampled_from(FinishReason)),
    stop_reason=nullable(integers | text),
    events=nullable(
        st.lists(st.builds(EngineCoreEvent, st.sampled_from(EventType), numbers), max_size=3).map(
            tuple
        )
    ),
    kv_transfer_params=nullable(plain_maps),
    ec_transfer_params=nullable(plain_maps),
    trace_headers=plain,
    prefill_stats=nullable(
        st.builds(PrefillStats, num_prompt_tokens=counts, num_cached_tokens=counts)
    ),
    routed_experts=plain,
    num_nans_in_logits=counts,
    mm_cache_miss_hashes=nullable(st.lists(text, max_size=2)),
    new_sampling_mask=plain,
    spec_decode_metrics=nullable(plain_maps),
    prompt_token_id_logprobs=plain,
    error=nullable(st.builds(OutputError, text, text, st.booleans())),
)
streaming_outputs = st.tuples(text, token_ids).map(lambda pair: EngineCoreOutput(*pair))

scheduler_stats = st.builds(
    SchedulerStats,
    num_running_reqs=counts,
    num_waiting_reqs=counts,
    step_counter=counts,
    current_wave=counts,
    kv_cache_usage=numbers,
    prefix_cache_stats=st.builds(PrefixCacheStats, reset=st.booleans(), hits=counts),
    kv_cache_eviction_events=st.lists(plain, max_size=2),
    perf_stats=plain,
)

batches = st.builds(
    EngineCoreOutputs,
    engine_index=counts,
    outputs=st.lists(streaming_outputs | outputs, min_size=1, max_size=4),
    scheduler_stats=nullable(scheduler_stats),
    timestamp=numbers,
    finished_requests=nullable(st.lists(text, max_size=3)),
    weight_version=nullable(text),
)
replies = st.builds(UtilityReply, call_id=call_ids, result=plain) | st.builds(
    UtilityReply, call_id=call_ids, failure_message=text
)


@unhurried
@given(requests)
def test_a_request_survives_the_wire(request: EngineCoreRequest) -> None:
    assert decode_input(encode_add(request)) == request


@unhurried
@given(sampling_params)
def test_sampling_params_survive_the_wire(params: SamplingParams) -> None:
    assert SamplingParams.from_wire(unpack(params.to_wire())) == params
    assert dataclasses.replace(params) == params


@unhurried
@given(st.lists(name))
def test_an_abort_survives_the_wire(request_ids: list[str]) -> None:
    assert decode_input(encode_abort(request_ids)) == Abort(tuple(request_ids))


@unhurried
@given(st.builds(UtilityCall, counts, call_ids, text, st.lists(plain, max_size=4).map(tuple)))
def test_a_utility_call_survives_the_wire(call: UtilityCall) -> None:
    assert decode_input(encode_utility(call)) == call


@unhurried
@given(batches, st.booleans())
def test_a_batch_of_outputs_survives_the_wire_in_both_shapes(
    batch: EngineCoreOutputs, full: bool
) -> None:
    assert decode_outputs(encode_outputs(batch, full=full)) == batch


@unhurried
@given(replies, st.booleans())
def test_a_utility_reply_survives_the_wire_in_both_shapes(reply: UtilityReply, full: bool) -> None:
    message = EngineCoreOutputs(outputs=[], utility_output=reply)
    assert decode_outputs(encode_outputs(message, full=full)) == message


@unhurried
@given(st.builds(Hello, st.booleans(), st.booleans()))
def test_a_hello_survives_the_wire(hello: Hello) -> None:
    assert decode_handshake(hello.encode()) == hello


@unhurried
@given(st.builds(Ready, st.booleans(), st.booleans(), nullable(text)))
def test_a_ready_survives_the_wire(ready: Ready) -> None:
    assert decode_handshake(ready.encode()) == ready


@unhurried
@given(
    st.lists(st.tuples(text, text), min_size=1, max_size=3),
    st.none() | text,
    plain_maps,
)
def test_an_init_survives_the_wire(
    addresses: list[tuple[str, str]], coordinator: str | None, parallel_config: dict[object, object]
) -> None:
    inputs, outputs = zip(*addresses, strict=True)
    init = Init(inputs, outputs, coordinator, coordinator, None, parallel_config)
    assert Init.decode(init.encode()) == init


@unhurried
@given(st.data())
def test_a_registration_survives_the_wire(data: st.DataObject) -> None:
    strategies: dict[str, st.SearchStrategy[object]] = {
        "int": counts,
        "bool": st.booleans(),
        "str": text,
        "str | None": nullable(text),
        "int | None": nullable(counts),
        "float | None": nullable(numbers),
        "Mapping[object, object] | None": nullable(plain_maps),
    }
    fields = {
        field.name: data.draw(strategies[str(field.type)], field.name)
        for field in dataclasses.fields(Registration)
    }
    fields["dtype"] = data.draw(st.sampled_from(["float32", "float16", "bfloat16"]))
    registration = Registration(**fields)  # type: ignore[arg-type]
    assert Registration.decode(registration.encode()) == registration


@unhurried
@given(
    st.builds(
        AbortReceipt,
        st.dictionaries(
            text,
            st.builds(
                RequestReceipt,
                st.sampled_from(["aborted", "finished", "unknown", "pending", "engine_error"]),
                counts,
                nullable(text),
            ),
            max_size=4,
        ),
        counts,
        counts,
    )
)
def test_L5_any_receipt_survives_the_wire(receipt: AbortReceipt) -> None:
    assert AbortReceipt.from_wire(unpack(pack(receipt.to_wire()))) == receipt


@unhurried
@given(
    st.builds(
        EngineStatus,
        state=text,
        num_running=counts,
        num_waiting=counts,
        num_blocks=counts,
        num_steps=counts,
        weight_version=nullable(text),
        integrity_errors=st.lists(text, max_size=3).map(tuple),
        counters=st.dictionaries(text, integers, max_size=3),
    )
)
def test_any_status_survives_the_wire(status: EngineStatus) -> None:
    assert EngineStatus.from_wire(unpack(pack(status.to_wire()))) == status
