"""vLLM's HTTP dialect beside OpenAI's: aborts, and token ids in, token ids out."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from frontend.async_engine import AsyncEngine
from frontend.http import vllm
from frontend.http.vllm.tokens import TokensForm, UsageWanted
from frontend.outputs import AbortCause, RequestOutput, TokenLogprobs
from tests.support.auto_answers import AutoAnswers, mock_tokens
from tests.support.called_routes import RouteClient
from tests.support.mock_fleet import mock_fleet

GENERATE = "/inference/v1/generate"


@asynccontextmanager
async def served(**options: bool) -> AsyncIterator[tuple[RouteClient, AsyncEngine]]:
    async with mock_fleet() as (engine, [mock]), AutoAnswers(mock):
        yield RouteClient(vllm.routes(engine, **options)), engine


def start_endless(client: RouteClient, *names: str) -> None:
    for name in names:
        client.start(
            "POST", GENERATE, {"token_ids": [5], "sampling_params": {}, "request_id": name}
        )


def usage(num_prompt_tokens: int, num_output_tokens: int) -> dict[str, object]:
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_output_tokens,
        "total_tokens": num_prompt_tokens + num_output_tokens,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


# -- generation ------------------------------------------------------------------------------------


async def test_token_ids_in_token_ids_out() -> None:
    async with served() as (client, engine):
        body = {"token_ids": [5, 6], "sampling_params": {"max_tokens": 3}, "request_id": "one"}
        reply = (await client.post(GENERATE, body)).json()
        assert reply.pop("created") > 0
        assert reply == {
            "request_id": "generate-tokens-one",
            "model": engine.served_model_name,
            "choices": [
                {
                    "index": 0,
                    "token_ids": mock_tokens([5, 6], 3),
                    "logprobs": None,
                    "finish_reason": "length",
                    "weight_versions": [{"version": "default", "start": 0, "end": 3}],
                }
            ],
            "usage": usage(2, 3),
            "prompt_logprobs": None,
            "kv_transfer_params": None,
        }


async def test_without_max_tokens_the_context_is_the_limit() -> None:
    async with served() as (client, engine):
        start_endless(client, "long")
        sent = engine._dispatcher.registry.select(lambda _: True)
        assert len(sent) == 1
        answer = await client.post("/abort_requests", {"request_ids": ["long"]})
        assert answer.json()["aborted"] == 1


async def test_a_stream_brings_what_is_new_and_then_the_usage() -> None:
    async with served() as (client, _):
        body = {
            "token_ids": [5],
            "sampling_params": {"max_tokens": 6},
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        *events, last = (await client.post(GENERATE, body)).events()
        ids = [token_id for event in events for token_id in event["choices"][0]["token_ids"]]
        assert ids == mock_tokens([5], 6)
        reasons = [event["choices"][0]["finish_reason"] for event in events]
        assert reasons == [None] * (len(events) - 1) + ["length"]
        assert last["choices"] == []
        assert last["usage"] == usage(1, 6)
        assert {event["request_id"] for event in events} == {last["request_id"]}


async def test_samples_are_choices_of_one_answer_and_share_its_names() -> None:
    async with served() as (client, engine):
        body = {"token_ids": [5], "sampling_params": {"max_tokens": 2, "n": 3, "seed": 1}}
        reply = (await client.post(GENERATE, body)).json()
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
        assert reply["usage"]["completion_tokens"] == 6
        endless = {"token_ids": [5], "sampling_params": {"n": 2}, "request_id": "many"}
        call = client.start("POST", GENERATE, endless, {"x-request-id": "header"})
        assert engine.num_live_requests == 2
        answer = await client.post("/abort_requests", {"request_ids": ["header"]})
        assert set(answer.json()["requests"]) == {"many-0", "many-1"}
        assert [c["finish_reason"] for c in (await call.answer()).json()["choices"]] == [
            "abort",
            "abort",
        ]


def test_an_event_has_logprobs_by_token_id_and_a_plain_one_none() -> None:
    logprobs = TokenLogprobs(7, -0.5, 1, ((7, -0.5), (9, float("-inf"))))
    form = TokensForm(
        "id", "model", num_choices=1, has_logprobs=True, usage=UsageWanted(False, True)
    )
    event = _data(form.event(0, RequestOutput("x", "", (7,), (logprobs,), 4)))
    assert event["choices"][0]["logprobs"]["content"] == [
        {
            "token": "token_id:7",
            "logprob": -0.5,
            "bytes": None,
            "top_logprobs": [
                {"token": "token_id:7", "logprob": -0.5, "bytes": None},
                {"token": "token_id:9", "logprob": -9999.0, "bytes": None},
            ],
        }
    ]
    assert event["usage"] == usage(4, 1)
    plain = TokensForm(
        'i"d', "model", num_choices=1, has_logprobs=False, usage=UsageWanted(False, False)
    )
    assert _data(plain.event(0, RequestOutput("x", "", (7, 8), (), 4))) == {
        "request_id": 'i"d',
        "choices": [{"index": 0, "token_ids": [7, 8], "logprobs": None, "finish_reason": None}],
    }


def test_the_prompts_logprobs_are_told_by_token_id() -> None:
    form = TokensForm(
        "id",
        "model",
        num_choices=1,
        has_logprobs=False,
        has_prompt_logprobs=True,
        usage=UsageWanted(False, False),
    )
    record = TokenLogprobs(7, -0.5, 3, ((9, -0.25),))
    total = RequestOutput("x", "", (1,), (), 2, finish_reason="length", prompt_logprobs=(record,))
    assert json.loads(form.body([total]))["prompt_logprobs"] == [
        None,
        {
            "7": {"logprob": -0.5, "rank": 3, "decoded_token": None},
            "9": {"logprob": -0.25, "rank": 1, "decoded_token": None},
        },
    ]


def test_L1_an_abort_without_new_tokens_still_has_its_last_event() -> None:
    form = TokensForm(
        "id", "model", num_choices=1, has_logprobs=False, usage=UsageWanted(False, False)
    )
    last = RequestOutput("x", finish_reason="abort", abort_cause=AbortCause.EXPLICIT)
    choice = _data(form.event(0, last))["choices"][0]
    assert (choice["token_ids"], choice["finish_reason"]) == ([], "abort")
    assert choice["abort_cause"] == "explicit"


def _data(event: bytes) -> Any:
    assert event.endswith(b"\n\n")
    return json.loads(event.removeprefix(b"data: "))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"sampling_params": {}}, "token_ids"),
        ({"token_ids": [], "sampling_params": {}}, "token_ids"),
        ({"token_ids": [1]}, "sampling_params"),
        ({"token_ids": [1], "sampling_params": {"max_new_tokens": 1}}, None),
        ({"token_ids": [1], "sampling_params": {"n": 0}}, "sampling_params.n"),
        ({"token_ids": [1], "sampling_params": {"structured_outputs": {}}}, None),
        ({"token_ids": [1], "sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens"),
        ({"token_ids": [1], "sampling_params": {}, "kv_transfer_params": {}}, None),
        (
            {"token_ids": [1], "sampling_params": {"prompt_logprobs": 1}, "stream": True},
            "sampling_params.prompt_logprobs",
        ),
    ],
)
async def test_a_bad_body_is_a_400_that_names_the_field(
    body: dict[str, Any], param: str | None
) -> None:
    async with served() as (client, engine):
        answer = await client.post(GENERATE, body)
        assert answer.status == 400
        error = answer.json()["error"]
        assert param is None or error["param"] == param
        assert engine.num_live_requests == 0


async def test_another_model_is_a_404() -> None:
    async with served() as (client, _):
        body = {"token_ids": [1], "sampling_params": {}, "model": "another"}
        assert (await client.post(GENERATE, body)).status == 404


# -- aborts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/abort_requests", "/inference/v1/abort_requests"])
async def test_L3_ids_are_exact_and_the_responses_id_is_one(path: str) -> None:
    async with served() as (client, engine):
        start_endless(client, "a", "a-1", "b")
        ids = ["generate-tokens-a", "b", "nobody"]
        reply = (await client.post(path, {"request_ids": ids})).json()
        assert (reply["status"], reply["aborted"], reply["num_aborted"]) == ("aborted", 2, 2)
        assert {name: each["status"] for name, each in reply["requests"].items()} == {
            "a": "aborted",
            "b": "aborted",
            "nobody": "unknown",
        }
        assert engine.num_live_requests == 1


async def test_L6_no_ids_mean_all_of_them_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served() as (client, engine):
        bodies: list[dict[str, Any]] = [{}, {"request_ids": []}, {"request_ids": None}]
        for body in bodies:
            start_endless(client, "a", "b")
            assert (await client.post("/abort_requests", body)).json()["aborted"] == 2
            assert engine.num_live_requests == 0
        assert caplog.text.count("every request is aborted") == 3


async def test_strict_selectors_refuse_an_abort_without_ids() -> None:
    async with served(strict_selectors=True) as (client, engine):
        start_endless(client, "a")
        bodies: list[dict[str, Any]] = [{}, {"request_ids": []}]
        for body in bodies:
            answer = await client.post("/abort_requests", body)
            assert answer.status == 400
            assert "abort_all" in answer.json()["error"]["message"]
        assert engine.num_live_requests == 1
        named = await client.post("/abort_requests", {"request_ids": ["a"]})
        assert named.json()["aborted"] == 1


async def test_an_abort_without_a_body_or_of_another_shape_aborts_nothing() -> None:
    async with served() as (client, engine):
        start_endless(client, "a")
        for body in (b"", b"{", b"[]", b'{"request_id": "a"}', b'{"request_ids": "a"}'):
            for path in ("/abort_requests", "/inference/v1/abort_requests"):
                assert (await client.post(path, body)).status == 400
        assert (await client.post("/inference/v1/abort_requests", {})).status == 400
        empty = await client.post("/inference/v1/abort_requests", {"request_ids": []})
        assert (empty.status, empty.json()["aborted"]) == (200, 0)
        assert engine.num_live_requests == 1
