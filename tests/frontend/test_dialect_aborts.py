"""The same aborts in every dialect: `Engine`, and each abort route against each way to generate.

All of them act on one engine, whose tokens are arithmetic, so every partial result checks itself.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pytest

from engine_core.fake_runner import expected_tokens
from frontend.config import FrontendConfig, HttpConfig
from frontend.http.server import all_routes
from frontend.sync.engine import Engine
from ipc.engine_config import EngineConfig
from tests.support.called_routes import Answer, RouteClient

T = TypeVar("T")
WAIT_S = 20.0
MAX_NUM_SEQS = 4


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a caller has of its request in the end."""

    token_ids: list[int]
    finish_reason: str


Start = Callable[["Stage", str, list[int]], "concurrent.futures.Future[Outcome]"]
"""Starts a request without an end: (stage, id, prompt)."""
Abort = Callable[["Stage", Sequence[str] | None], dict[str, Any]]
"""Aborts by ids, or everything for None; returns the receipt's requests."""


class Stage:
    """An engine, and clients of all its faces."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.pool = concurrent.futures.ThreadPoolExecutor(16)
        self.routes = self.on_loop(self._make_routes())

    def on_loop(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.engine._loop_thread.run(coroutine)

    def post(self, path: str, body: object) -> Answer:
        return self.on_loop(self.routes.post(path, body))

    def later(
        self, path: str, body: object, read: Callable[[Answer], Outcome]
    ) -> concurrent.futures.Future[Outcome]:
        """Send a request, and read its answer when it is there."""

        async def send() -> asyncio.Task[Answer]:
            return asyncio.create_task(self.routes.start("POST", path, body).answer())

        async def receive(task: asyncio.Task[Answer]) -> Answer:
            return await task

        task = self.on_loop(send())
        return self.pool.submit(lambda: read(self.on_loop(receive(task))))

    def wait_for_live(self, number: int) -> None:
        self._wait_until(lambda: self.engine._engine.num_live_requests == number)

    def wait_for_running(self, number: int) -> None:
        self._wait_until(lambda: self.engine.status()[0].num_running == number)

    def wait_for_a_token(self) -> None:
        """Of each request that runs."""

        async def counts() -> list[int]:
            return [each.num_output_tokens for each in await self.engine._engine.list_requests()]

        self._wait_until(lambda: all(self.on_loop(counts())))

    def assert_idle(self) -> None:
        self.wait_for_live(0)
        self._wait_until(lambda: self._num_in_engine() == 0)

    def _num_in_engine(self) -> int:
        status = self.engine.status()[0]
        return status.num_running + status.num_waiting

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WAIT_S
        while not condition():
            assert time.monotonic() < deadline, "it never came true"
            time.sleep(0.002)

    async def _make_routes(self) -> RouteClient:
        return RouteClient(all_routes(self.engine._engine, HttpConfig()))


@pytest.fixture(scope="module")
def running() -> Iterator[Stage]:
    config = EngineConfig(
        model="fake",
        runner="fake",
        max_model_len=4096,
        max_num_seqs=MAX_NUM_SEQS,
        fake_step_time_ms=1.0,
    )
    with Engine(config=FrontendConfig(engine=config)) as engine:
        stage = Stage(engine)
        yield stage
        engine.abort_request(abort_all=True)
        stage.pool.shutdown()


@pytest.fixture
def stage(running: Stage) -> Iterator[Stage]:
    yield running
    running.engine.abort_request(abort_all=True)
    running.assert_idle()


# -- ways to generate ------------------------------------------------------------------------------


def in_python(stage: Stage, name: str, prompt: list[int]) -> concurrent.futures.Future[Outcome]:
    def generate() -> Outcome:
        params = {"max_new_tokens": None, "ignore_eos": True}
        return _from_sglang(stage.engine.generate(None, params, prompt, rid=name))

    return stage.pool.submit(generate)


def by_sglang(stage: Stage, name: str, prompt: list[int]) -> concurrent.futures.Future[Outcome]:
    return stage.later(
        "/generate", _sglang_body(name, prompt), lambda answer: _from_sglang(_whole(answer))
    )


def by_sglang_stream(
    stage: Stage, name: str, prompt: list[int]
) -> concurrent.futures.Future[Outcome]:
    body = _sglang_body(name, prompt) | {"stream": True}
    return stage.later("/generate", body, lambda answer: _from_sglang(answer.events()[-1]))


def by_vllm(stage: Stage, name: str, prompt: list[int]) -> concurrent.futures.Future[Outcome]:
    body = {"token_ids": prompt, "sampling_params": {}, "request_id": name}
    return stage.later(
        "/inference/v1/generate", body, lambda answer: _from_choices([_whole(answer)])
    )


def by_vllm_stream(
    stage: Stage, name: str, prompt: list[int]
) -> concurrent.futures.Future[Outcome]:
    body = {"token_ids": prompt, "sampling_params": {}, "request_id": name, "stream": True}
    return stage.later(
        "/inference/v1/generate", body, lambda answer: _from_choices(answer.events())
    )


def by_openai(stage: Stage, name: str, prompt: list[int]) -> concurrent.futures.Future[Outcome]:
    body = _openai_body(name, prompt)
    return stage.later("/v1/completions", body, lambda answer: _from_choices([_whole(answer)]))


def by_openai_stream(
    stage: Stage, name: str, prompt: list[int]
) -> concurrent.futures.Future[Outcome]:
    body = _openai_body(name, prompt) | {"stream": True}
    return stage.later("/v1/completions", body, lambda answer: _from_choices(answer.events()))


def _sglang_body(name: str, prompt: list[int]) -> dict[str, Any]:
    params = {"max_new_tokens": None, "ignore_eos": True}
    return {"input_ids": prompt, "rid": name, "sampling_params": params}


def _openai_body(name: str, prompt: list[int]) -> dict[str, Any]:
    return {"prompt": prompt, "max_tokens": None, "request_id": name, "return_token_ids": True}


def _whole(answer: Answer) -> Any:
    assert answer.status == 200
    return answer.json()


def _from_sglang(result: dict[str, Any]) -> Outcome:
    return Outcome(result["output_ids"], result["meta_info"]["finish_reason"]["type"])


def _from_choices(replies: Sequence[dict[str, Any]]) -> Outcome:
    choices = [reply["choices"][0] for reply in replies]
    ids = [token_id for choice in choices for token_id in choice["token_ids"]]
    return Outcome(ids, choices[-1]["finish_reason"])


STARTS = (
    *(in_python, by_sglang, by_sglang_stream, by_vllm, by_vllm_stream),
    *(by_openai, by_openai_stream),
)


# -- ways to abort ---------------------------------------------------------------------------------


def with_engine(stage: Stage, names: Sequence[str] | None) -> dict[str, Any]:
    receipt = stage.engine.abort_request(names or "", abort_all=names is None)
    assert receipt is not None
    return {
        name: {"status": each.status, "num_output_tokens": each.num_output_tokens}
        for name, each in receipt.requests.items()
    }


def with_our_route(stage: Stage, names: Sequence[str] | None) -> dict[str, Any]:
    body = {"abort_all": True} if names is None else {"request_id": names}
    return _receipt(stage.post("/v1/abort", body))


def with_sglangs(stage: Stage, names: Sequence[str] | None) -> dict[str, Any]:
    body = {"abort_all": True} if names is None else {"rid": names}
    return _receipt(stage.post("/abort_request", body))


def with_vllms(stage: Stage, names: Sequence[str] | None) -> dict[str, Any]:
    return _receipt(stage.post("/abort_requests", {} if names is None else {"request_ids": names}))


def with_vllms_by_name(stage: Stage, names: Sequence[str] | None) -> dict[str, Any]:
    return _receipt(stage.post("/inference/v1/abort_requests", {"request_ids": names}))


def with_fastdeploys(stage: Stage, names: Sequence[str] | None) -> dict[str, Any]:
    body = {"abort_all": True} if names is None else {"req_ids": names}
    return _receipt(stage.post("/v1/abort_requests", body))


def _receipt(answer: Answer) -> dict[str, Any]:
    assert answer.status == 200, answer.body
    requests: dict[str, Any] = answer.json()["requests"]
    return requests


ABORTS_OF_ALL = (with_engine, with_our_route, with_sglangs, with_vllms, with_fastdeploys)
ABORTS = (*ABORTS_OF_ALL, with_vllms_by_name)


# -- the contract ----------------------------------------------------------------------------------


@pytest.mark.parametrize("abort", ABORTS)
@pytest.mark.parametrize("start", STARTS)
def test_L2_L5_an_abort_returns_exactly_what_its_receipt_counts(
    stage: Stage, start: Start, abort: Abort
) -> None:
    future = start(stage, "victim", [5, 6])
    stage.wait_for_running(1)
    stage.wait_for_a_token()
    requests = abort(stage, ["victim"])
    # The effect is there before anybody looks at the request itself.
    assert stage.engine._engine.num_live_requests == 0
    assert stage.engine.status()[0].num_running == 0
    outcome = future.result(WAIT_S)
    assert outcome.finish_reason == "abort"
    assert outcome.token_ids == expected_tokens([5, 6], len(outcome.token_ids))
    assert len(outcome.token_ids) > 0
    assert requests["victim"]["status"] == "aborted"
    assert requests["victim"]["num_output_tokens"] == len(outcome.token_ids)


@pytest.mark.parametrize("abort", ABORTS)
def test_L3_an_id_is_never_matched_by_its_beginning(stage: Stage, abort: Abort) -> None:
    names = ["job", "job-1", "job-10"]
    futures = {name: by_vllm(stage, name, [5]) for name in names}
    stage.wait_for_live(3)
    assert set(abort(stage, ["job-1"])) == {"job-1"}
    assert futures.pop("job-1").result(WAIT_S).finish_reason == "abort"
    assert abort(stage, ["jo"])["jo"]["status"] == "unknown"
    stage.wait_for_a_token()
    assert not any(future.done() for future in futures.values())
    assert stage.engine._engine.num_live_requests == 2


@pytest.mark.parametrize("start", STARTS)
def test_L4_a_request_in_the_queue_ends_as_well_with_nothing(stage: Stage, start: Start) -> None:
    running = [by_vllm(stage, f"running-{index}", [5]) for index in range(MAX_NUM_SEQS)]
    stage.wait_for_running(MAX_NUM_SEQS)
    waiting = start(stage, "waiting", [7])
    stage.wait_for_live(MAX_NUM_SEQS + 1)
    assert with_our_route(stage, ["waiting"])["waiting"] == {
        "status": "aborted",
        "num_output_tokens": 0,
        "stage": "waiting",
    }
    assert waiting.result(WAIT_S) == Outcome([], "abort")
    assert not any(future.done() for future in running)


@pytest.mark.parametrize("abort", ABORTS_OF_ALL)
def test_L6_abort_all_ends_what_came_before_and_nothing_after(stage: Stage, abort: Abort) -> None:
    starts = [*STARTS, by_vllm]  # twice as many as run at once
    futures = [start(stage, f"r{index}", [9]) for index, start in enumerate(starts)]
    stage.wait_for_live(len(starts))
    requests = abort(stage, None)
    assert {each["status"] for each in requests.values()} == {"aborted"}
    assert len(requests) == len(starts)
    later = by_vllm(stage, "later", [9])
    for future in futures:
        outcome = future.result(WAIT_S)
        assert outcome.finish_reason == "abort"
        assert outcome.token_ids == expected_tokens([9], len(outcome.token_ids))
    stage.wait_for_a_token()
    assert not later.done()


@pytest.mark.parametrize("abort", ABORTS)
def test_L8_repeating_an_abort_or_naming_a_stranger_is_harmless(stage: Stage, abort: Abort) -> None:
    bystander = by_openai_stream(stage, "bystander", [5])
    victim = by_sglang(stage, "victim", [6])
    stage.wait_for_running(2)
    assert abort(stage, ["victim", "victim"])["victim"]["status"] == "aborted"
    assert abort(stage, ["victim", "nobody"]).keys() == {"victim", "nobody"}
    assert victim.result(WAIT_S).finish_reason == "abort"
    again = by_sglang(stage, "victim", [6])  # the id is free
    stage.wait_for_running(2)
    assert not bystander.done()
    assert not again.done()


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/abort", {}, 400),
        ("/v1/abort", {"request_id": []}, 400),
        ("/abort_request", {}, 200),
        ("/abort_request", {"rid": ""}, 200),
        ("/inference/v1/abort_requests", {}, 400),
        ("/inference/v1/abort_requests", {"request_ids": []}, 200),
        ("/v1/abort_requests", {}, 400),
        ("/v1/abort_requests", {"req_ids": []}, 400),
    ],
)
def test_an_abort_that_names_nothing_aborts_nothing(
    stage: Stage, path: str, body: dict[str, Any], status: int
) -> None:
    bystander = by_vllm(stage, "bystander", [5])
    stage.wait_for_running(1)
    assert stage.post(path, body).status == status
    assert stage.engine._engine.num_live_requests == 1
    assert not bystander.done()


@pytest.mark.parametrize(
    ("path", "field"),
    [
        ("/v1/abort", "request_id"),
        ("/abort_request", "rid"),
        ("/abort_requests", "request_ids"),
        ("/inference/v1/abort_requests", "request_ids"),
        ("/v1/abort_requests", "req_ids"),
    ],
)
def test_an_abort_of_too_many_ids_names_the_limit_and_aborts_nothing(
    stage: Stage, path: str, field: str
) -> None:
    bystander = by_vllm(stage, "bystander", [5])
    stage.wait_for_running(1)
    answer = stage.post(path, {field: ["bystander"] * 65_537})
    assert answer.status == 400
    error = answer.json()["error"]
    assert error["param"] == field
    assert "to 65536 strings" in error["message"]
    assert "(65537 entries)" in error["message"]
    assert not bystander.done()
    assert stage.engine._engine.num_live_requests == 1


@pytest.mark.parametrize(
    ("path", "wrong", "right"),
    [
        ("/v1/abort", "stop_all", "abort_all"),
        ("/v1/abort", "request_ids", "request_id"),
        ("/abort_request", "rids", "rid"),
        ("/abort_requests", "request_id", "request_ids"),
        ("/inference/v1/abort_requests", "requests", "request_ids"),
        ("/v1/abort_requests", "request_ids", "req_ids"),
    ],
)
def test_an_unknown_field_names_the_nearest_one_and_aborts_nothing(
    stage: Stage, path: str, wrong: str, right: str
) -> None:
    bystander = by_vllm(stage, "bystander", [5])
    stage.wait_for_running(1)
    answer = stage.post(path, {wrong: ["bystander"]})
    assert answer.status == 400
    message = answer.json()["error"]["message"]
    assert wrong in message
    assert f"did you mean '{right}'" in message
    assert not bystander.done()
    assert stage.engine._engine.num_live_requests == 1
