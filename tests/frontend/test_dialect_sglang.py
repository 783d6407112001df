"""SGLang's HTTP dialect: `/generate`, `/abort_request`, and what tells about the server."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from frontend.async_engine import AsyncEngine
from frontend.http import sglang
from frontend.http.errors import ApiError
from frontend.http.sglang.events import GenerateForm
from frontend.outputs import AbortCause, RequestOutput, TokenLogprobs
from frontend.sglang.calls import read_call
from frontend.sglang.results import ResultBuilder
from tests.support.auto_answers import AutoAnswers, mock_tokens
from tests.support.called_routes import RouteClient
from tests.support.mock_fleet import mock_fleet

ENDLESS = {"max_new_tokens": None, "ignore_eos": True}


@asynccontextmanager
async def served(step_time_ms: float = 1.0) -> AsyncIterator[tuple[RouteClient, AsyncEngine]]:
    async with mock_fleet() as (engine, [mock]), AutoAnswers(mock, step_time_ms=step_time_ms):
        yield RouteClient(sglang.routes(engine)), engine


# -- results ---------------------------------------------------------------------------------------


async def test_one_prompt_gives_one_object() -> None:
    async with served() as (client, _):
        body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 4}, "rid": "one"}
        answer = await client.post("/generate", body)
        assert answer.status == 200
        result = answer.json()
        assert result["output_ids"] == mock_tokens([5, 6], 4)
        info = result["meta_info"]
        assert info.pop("e2e_latency") > 0
        assert info == {
            "id": "one",
            "finish_reason": {"type": "length", "length": 4},
            "prompt_tokens": 2,
            "completion_tokens": 4,
            "cached_tokens": 0,
            "weight_version": "default",
            "weight_versions": [{"version": "default", "start": 0, "end": 4}],
        }


async def test_a_batch_and_samples_give_one_flat_list_in_the_prompts_order() -> None:
    async with served() as (client, _):
        params = {"max_new_tokens": 2, "n": 2}
        body = {"input_ids": [[5], [7]], "sampling_params": params, "rid": "x"}
        results = (await client.post("/generate", body)).json()
        assert [r["output_ids"] for r in results] == [
            mock_tokens(prompt, 2) for prompt in ([5], [5], [7], [7])
        ]
        assert [r["meta_info"]["id"] for r in results] == ["x_0", "x_1", "x_2", "x_3"]
        text = {"text": "def f", "sampling_params": {"max_new_tokens": 1}}
        assert isinstance((await client.post("/generate", text)).json(), dict)


async def test_put_is_as_good_as_post() -> None:
    async with served() as (client, _):
        body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 1}}
        answer = await client.start("PUT", "/generate", body).answer()
        assert answer.json()["output_ids"] == mock_tokens([5], 1)


async def test_a_stream_is_cumulative_and_its_last_event_is_the_whole_result() -> None:
    async with served() as (client, _):
        body = {"input_ids": [60], "sampling_params": {"max_new_tokens": 9}}
        whole = (await client.post("/generate", body)).json()
        answer = await client.post("/generate", body | {"stream": True})
        assert "text/event-stream" in answer.head
        events = answer.events()
        for before, after in itertools.pairwise(events):
            assert after["text"].startswith(before["text"])
            assert after["output_ids"][: len(before["output_ids"])] == before["output_ids"]
            assert before["meta_info"]["finish_reason"] is None
        for result in (whole, events[-1]):
            del result["meta_info"]["id"], result["meta_info"]["e2e_latency"]
        assert events[-1] == whole


async def test_a_streamed_list_says_whose_event_it_is() -> None:
    async with served() as (client, _):
        body = {"input_ids": [[5], [6]], "sampling_params": {"max_new_tokens": 3}, "stream": True}
        last = {event["index"]: event for event in (await client.post("/generate", body)).events()}
        assert [last[i]["output_ids"] for i in (0, 1)] == [mock_tokens([5], 3), mock_tokens([6], 3)]


@pytest.mark.parametrize("with_text", [False, True])
def test_L2_growing_events_and_dictionaries_say_the_same(with_text: bool) -> None:
    call = read_call(
        None,
        [[1], [2]],
        None,
        return_logprob=True,
        top_logprobs_num=2,
        logprob_start_len=1,
        return_text_in_logprobs=with_text,
    )
    form = GenerateForm(call, "<{}>".format)
    form.streams = [_Stream(), _Stream()]  # type: ignore[list-item]  # all that is looked at
    builder = ResultBuilder(call, 1, token_text="<{}>".format)
    outputs = [
        RequestOutput(
            *("x", 'a "quoted"', (3, 4), (_logprobs(3), _logprobs(4)), 1),
            prompt_logprobs=(_logprobs(11), _logprobs(12)),
        ),
        RequestOutput("x", "", (5,), (_logprobs(5),), 1),
        RequestOutput("x", "\u2028\n\U0001f600", (), (), 1, 0, "abort", None, AbortCause.EXPLICIT),
    ]
    for output in outputs:
        event = form.event(1, output)
        assert event.startswith(b"data: {")
        assert event.endswith(b"}\n\n")
        streamed = json.loads(event.removeprefix(b"data: "))
        expected = json.loads(json.dumps(builder.add(output, _Stream.prompt_token_ids)))
        del streamed["meta_info"]["e2e_latency"], expected["meta_info"]["e2e_latency"]
        assert streamed == expected | {"index": 1}
    text = "<4>" if with_text else None
    assert streamed["meta_info"]["output_token_logprobs"][1] == [-0.5, 4, text]
    assert streamed["meta_info"]["output_top_logprobs"][2] == [[-0.25, 1, "<1>" if text else None]]

    first = "<11>" if with_text else None
    assert streamed["meta_info"]["input_token_logprobs"] == [
        [None, 11, first],
        [-0.5, 12, "<12>" if with_text else None],
    ]
    assert streamed["meta_info"]["input_top_logprobs"][0] is None


class _Stream:
    prompt_token_ids = (10, 11, 12)


def _logprobs(token_id: int) -> TokenLogprobs:
    return TokenLogprobs(token_id, -0.5, 2, ((1, -0.25),))


def test_an_error_within_a_stream_is_an_event_in_sglangs_shape() -> None:
    call = read_call(None, [1], None)
    event = GenerateForm(call, None).error_event(0, ApiError(503, "later"))
    assert json.loads(event.removeprefix(b"data: ")) == {
        "error": {"message": "later", "type": "server_error", "code": 503, "retryable": True}
    }


def with_params(**params: Any) -> dict[str, Any]:
    return {"input_ids": [1], "sampling_params": params}


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({}, None, "either a prompt text or input_ids"),
        ({"text": "a", "input_ids": [1]}, None, "either a prompt text or input_ids"),
        ({"input_ids": [[1], [2]], "rid": ["a"]}, "rid", "rid has 1 entries for 2"),
        ({"input_ids": [[1], [2]], "rid": ["a", "a"]}, "rid", "'a' for 2 prompts of this call"),
        (with_params(n=0), "sampling_params.n", "n=0 must be an integer from 1 to"),
        (with_params(stopp="x"), "sampling_params.stopp", "did you mean 'stop'"),
        (with_params(regex="a+"), "sampling_params.regex", "not supported"),
        (with_params(max_new_tokens=-1), "sampling_params.max_new_tokens", "max_new_tokens: "),
        (
            with_params(max_new_tokens=3, min_new_tokens=5),
            "sampling_params.min_new_tokens",
            "min_new_tokens: 5 exceeds max_new_tokens 3",
        ),
        (with_params(stop="x" * 1025), "sampling_params.stop", "1025 characters, but at most 1024"),
        ({"input_ids": [1], "top_logprobs_num": 129}, "top_logprobs_num", "from 0 to 128"),
        ({"input_ids": [1], "max_new_tokens": 5}, "max_new_tokens", "known are text, input_ids"),
        ({"input_ids": [1], "inputids": 5}, "inputids", "did you mean 'input_ids'?"),
        (
            {"input_ids": [1], "return_routed_experts": True},
            "return_routed_experts",
            "return_routed_experts=true is not supported",
        ),
        ({"input_ids": [1, [2]]}, "input_ids", "mixes token ids and lists"),
        ({"input_ids": [[1], 2]}, "input_ids", "mixes token ids and lists"),
        ({"input_ids": [-1]}, "input_ids", "input_ids[0]"),
        ({"input_ids": []}, "input_ids", "the prompt is empty"),
        ({"input_ids": [[1]] * 5, "sampling_params": {"n": 4000}}, None, "exceed 4096 in all"),
        ({"text": []}, "text", "the list of prompts is empty"),
        ({"input_ids": "abc"}, "input_ids", "input_ids"),
    ],
)
async def test_a_bad_body_is_a_400_that_names_it(
    body: dict[str, Any], param: str | None, message: str
) -> None:
    async with served() as (client, engine):
        for stream in (False, True):
            answer = await client.post("/generate", body | {"stream": stream})
            assert answer.status == 400
            error = answer.json()["error"]
            assert message in error["message"]
            assert param is None or error["param"] == param
        assert engine.num_live_requests == 0


async def test_fields_that_ask_for_nothing_are_welcome() -> None:
    async with served() as (client, _):
        body = {
            "input_ids": [5],
            "sampling_params": {"max_new_tokens": 1},
            "image_data": None,
            "return_hidden_states": False,
            "some_later_field": None,
            "another_later_field": False,
        }
        assert (await client.post("/generate", body)).status == 200


async def test_L8_a_live_rid_is_refused_and_free_again_after_its_end() -> None:
    async with served() as (client, engine):
        first = client.start("POST", "/generate", {"input_ids": [1], "rid": "r"})
        second = await client.post("/generate", {"input_ids": [1], "rid": "r"})
        assert second.status == 400
        assert "Duplicate request ID" in second.json()["error"]["message"]
        assert "'r'" in second.json()["error"]["message"]
        assert engine.num_live_requests == 1
        assert (await first.answer()).status == 200
        assert (await client.post("/generate", {"input_ids": [1], "rid": "r"})).status == 200
        twice = {"input_ids": [[1], [2]], "rid": ["same", "same"]}
        assert (await client.post("/generate", twice)).status == 400
        assert engine.num_live_requests == 0


# -- aborts ----------------------------------------------------------------------------------------


async def test_L2_an_aborted_request_is_a_success_with_what_it_has() -> None:
    async with served() as (client, _):
        plain = client.start(
            "POST",
            "/generate",
            {
                "input_ids": [5],
                "sampling_params": ENDLESS,
                "rid": "victim",
                "return_logprob": False,
            },
        )
        stream = client.start(
            "POST",
            "/generate",
            {"input_ids": [6], "sampling_params": ENDLESS, "rid": "streamed", "stream": True},
        )
        await stream.begun()
        answer = await client.post("/abort_request", {"rid": ["victim", "streamed"]})
        assert answer.status == 200
        receipt = answer.json()
        assert receipt["num_aborted"] == 2
        assert receipt["engines"] == {"0": "ok"}
        results = {
            "victim": (await plain.answer()).json(),
            "streamed": (await stream.answer()).events()[-1],
        }
        for (name, result), prompt in zip(results.items(), ([5], [6]), strict=True):
            ids = result["output_ids"]
            assert ids == mock_tokens(prompt, len(ids))
            assert receipt["requests"][name]["num_output_tokens"] == len(ids)
            assert result["meta_info"]["finish_reason"]["type"] == "abort"


async def test_L3_rid_is_exact_and_prefix_tag_and_header_id_are_names_too() -> None:
    async with served() as (client, engine):

        def start(rid: str, **more: Any) -> None:
            headers = more.pop("headers", {})
            body = {"input_ids": [5], "sampling_params": ENDLESS, "rid": rid} | more
            client.start("POST", "/generate", body, headers)

        start("job")
        start("job-1", headers={"x-request-id": "header"})
        start("job-10")
        start("batch", input_ids=[[1], [2]])
        start("other", tags=["night"])
        assert engine.num_live_requests == 6

        async def aborted(**body: object) -> set[str]:
            answer = await client.post("/abort_request", body)
            assert answer.status == 200
            return set(answer.json()["requests"])

        assert await aborted(rid="batch") == {"batch_0", "batch_1"}
        assert await aborted(rid="header") == {"job-1"}
        assert await aborted(rid="job", prefix=True) == {"job", "job-10"}
        assert await aborted(tag="night") == {"other"}
        assert engine.num_live_requests == 0


async def test_an_empty_abort_is_a_200_that_aborts_nothing_and_warns(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served() as (client, engine):
        client.start("POST", "/generate", {"input_ids": [5], "sampling_params": ENDLESS})
        bodies: list[dict[str, Any]] = [{}, {"rid": ""}, {"rid": "", "abort_all": False}]
        for body in (*bodies, {"rid": []}):
            answer = await client.post("/abort_request", body)
            assert answer.status == 200
            assert answer.json()["requests"] == {}
        assert "nothing was aborted" in caplog.text
        assert engine.num_live_requests == 1
        assert (await client.post("/abort_request", {"rid": "nobody"})).status == 200
        assert engine.num_live_requests == 1


async def test_L6_abort_all_overrides_rid() -> None:
    async with served() as (client, engine):
        for _ in range(5):
            client.start("POST", "/generate", {"input_ids": [5], "sampling_params": ENDLESS})
        answer = await client.post("/abort_request", {"rid": "nobody", "abort_all": True})
        assert answer.json()["num_aborted"] == 5
        assert engine.num_live_requests == 0


async def test_an_abort_of_several_prefixes_is_refused_in_the_words_of_json() -> None:
    async with served() as (client, _):
        answer = await client.post("/abort_request", {"rid": ["a", "b"], "prefix": True})
        assert answer.status == 400
        assert "prefix=true needs one string as rid" in answer.json()["error"]["message"]


async def test_an_unknown_field_of_an_abort_names_the_nearest_one() -> None:
    async with served() as (client, engine):
        client.start("POST", "/generate", {"input_ids": [5], "sampling_params": ENDLESS})
        answer = await client.post("/abort_request", {"abort_al": True})
        assert answer.status == 400
        assert "did you mean 'abort_all'" in answer.json()["error"]["message"]
        assert engine.num_live_requests == 1


async def test_a_hang_up_ends_every_request_of_the_call() -> None:
    async with served() as (client, engine):
        for stream in (False, True):
            body = {"input_ids": [[5], [6]], "sampling_params": ENDLESS, "stream": stream}
            call = client.start("POST", "/generate", body)
            assert engine.num_live_requests == 2
            call.hang_up()
            assert engine.num_live_requests == 0


# -- the server ------------------------------------------------------------------------------------


async def test_loads_count_what_no_engine_has_yet_and_are_zero_when_all_is_done() -> None:
    async with served() as (client, _):
        client.start("POST", "/generate", {"input_ids": [5], "sampling_params": ENDLESS})
        client.start("POST", "/generate", {"text": "long " * 4000, "sampling_params": ENDLESS})
        loads = (await client.get("/v1/loads?include=core")).json()
        assert loads["aggregate"]["total_reqs"] == 2
        assert [load["dp_rank"] for load in loads["loads"]] == [0]
        await client.post("/abort_request", {"abort_all": True})
        loads = (await client.get("/v1/loads?include=core,disagg,queues")).json()
        assert loads["aggregate"]["total_reqs"] == 0
        assert loads["loads"][0]["num_total_reqs"] == 0
        assert (await client.get("/v1/loads?dp_rank=3")).json()["loads"] == []


async def test_the_model_and_the_server_tell_about_themselves() -> None:
    async with served() as (client, engine):
        model = (await client.get("/model_info")).json()
        assert model["weight_version"] == "default"
        assert model["is_generation"] is True
        assert (await client.get("/get_model_info")).json() == model
        server = (await client.get("/server_info")).json()
        assert server["dp_size"] == 1
        assert server["context_length"] == engine.max_model_len
        assert "vllm_config" not in server


async def test_server_info_has_vllms_shape_for_those_who_ask_as_vllms_clients_do() -> None:
    async with served() as (client, engine):
        config = (await client.get("/server_info?config_format=json")).json()["vllm_config"]
        assert config["model_config"]["dtype"] == f"torch.{engine.dtype}"
        assert config["model_config"]["max_model_len"] == engine.max_model_len
        assert config["parallel_config"]["data_parallel_size"] == 1
        assert (await client.get("/server_info?config_format=text")).status == 400


async def test_health_generate_is_503_unless_a_step_loop_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("frontend.http.sglang.info.HEALTH_TIMEOUT_S", 0.4)
    async with mock_fleet() as (engine, [mock]):
        client = RouteClient(sglang.routes(engine))
        assert (await client.get("/health_generate")).status == 200
        answering, mock.on_message = mock.on_message, lambda message: None  # it hangs in a step
        assert (await client.get("/health_generate")).status == 503
        assert engine.num_live_requests == 0
        mock.on_message = answering
        assert (await client.get("/health_generate")).status == 200
        await mock.die()
        async with asyncio.timeout(5):
            while engine.is_healthy:  # noqa: ASYNC110  # no event to await
                await asyncio.sleep(0.01)
        assert (await client.get("/health_generate")).status == 503


async def test_a_foreign_engine_proves_its_health_with_one_token() -> None:
    async with mock_fleet(caesura=False) as (engine, [mock]):
        client = RouteClient(sglang.routes(engine))
        async with AutoAnswers(mock):
            assert (await client.get("/health_generate")).status == 200
        assert mock.adds[0].sampling_params is not None
        assert mock.adds[0].sampling_params.max_tokens == 1
