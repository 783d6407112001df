"""Whatever is sent, the server answers as its page says, serves on, and keeps nothing.

Two ways: schemathesis makes requests from the published page, and mutations of valid bodies are
sent as bytes, since the worst of them (NaN, lone surrogates, repeated keys) no schema can make.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from frontend.config import BUNDLED_MODEL_DIRECTORY, FrontendConfig
from ipc.engine_config import EngineConfig
from tests.support.served_engine import PROMPT, ServedEngine, fake, served_engine

MAX_MODEL_LEN = 256
"""Bounds what a request that names no limit costs."""
SEED = 20_261_120
NUM_MUTATIONS = 1500
NUM_CLIENTS = 8

# What a page can promise: `positive_data_acceptance` is left out, as a schema cannot say "exactly
# one of these", nor know which models and tokenizers are here.
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
)

PAUSES = ("/v1/pause", "/pause", "/pause_generation")
"""They change what the others answer, so they are fuzzed by themselves."""

CHAT_BODY = {
    "messages": [{"role": "user", "content": [{"type": "text", "text": "def f"}]}],
    "max_completion_tokens": 4,
    "stop": ["\n"],
    "logprobs": True,
    "top_logprobs": 1,
}
SAMPLING: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "min_p": 0.1,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.1,
    "seed": 5,
    "stop": ["\n"],
    "stop_token_ids": [9],
    "logit_bias": {"5": 1.0},
    "n": 2,
}
VALID_BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": PROMPT, "max_tokens": 4, "logprobs": 1, **SAMPLING},
        {"prompt": [[1, 2], [3]], "max_tokens": 4, "stream": True, "request_id": "name"},
        {"prompt": "def f", "echo": True, "max_tokens": 3, "tags": ["a"], "timeout_s": 9.0},
        {"prompt": PROMPT, "stream": True, "stream_options": {"include_usage": True}},
    ],
    "/v1/chat/completions": [CHAT_BODY, CHAT_BODY | {"stream": True, "n": 2}],
    "/generate": [
        {"input_ids": PROMPT, "sampling_params": {"max_new_tokens": 4, "n": 2}, "rid": "name"},
        {"text": ["def f", "x"], "return_logprob": True, "logprob_start_len": 0, "stream": True},
    ],
    "/inference/v1/generate": [
        {"token_ids": PROMPT, "sampling_params": {"max_tokens": 4, "logprobs": 1, **SAMPLING}},
        {"token_ids": PROMPT, "sampling_params": {"max_tokens": 4}, "stream": True},
    ],
    "/tokenize": [{"prompt": "def f", "return_token_strs": True}, {"messages": [{"role": "user"}]}],
    "/detokenize": [{"tokens": [1, 2, 3]}],
    "/v1/abort": [{"request_id": ["name", "x"], "wait": True, "timeout_s": 1.0}, {"tag": "a"}],
    "/abort_request": [{"rid": ["name"], "prefix": True}, {"abort_all": True}],
    "/abort_requests": [{"request_ids": ["name"]}],
    "/inference/v1/abort_requests": [{"request_ids": ["name"]}],
    "/v1/abort_requests": [{"req_ids": ["name"], "abort_all": False}],
}
WILD = (
    *("null", "true", "false", "0", "-1", "1", "2", "1.5", "-0.0", "1e-320", "1e308"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "1" * 400),
    *("NaN", "Infinity", "-Infinity", "1e999", "01", "0x10", "+1"),
    *('""', '"\\u0000"', '"\\ud800"', '"\\udc00\\ud800"', '"\u2028"', '"{}"', '"5"', '"x\\ny"'),
    *('"' + "long " * 2000 + '"', "[" * 5000 + "]" * 5000, '{"a":' * 900 + "1" + "}" * 900),
    *("[]", "{}", "[null]", "[[]]", "[-1]", "[1.0]", "[4294967296]", '[""]', '{"":1}', '{"5":[]}'),
)


@pytest.fixture(params=["fake", "model"])
async def served(request: pytest.FixtureRequest) -> AsyncIterator[ServedEngine]:
    model = EngineConfig(model=str(BUNDLED_MODEL_DIRECTORY), max_model_len=MAX_MODEL_LEN)
    is_fake = request.param == "fake"
    config = fake(max_model_len=MAX_MODEL_LEN) if is_fake else FrontendConfig(engine=model)
    async with served_engine(config) as server:
        yield server


@pytest.fixture
async def bundled() -> AsyncIterator[ServedEngine]:
    model = EngineConfig(model=str(BUNDLED_MODEL_DIRECTORY), max_model_len=MAX_MODEL_LEN)
    async with served_engine(FrontendConfig(engine=model)) as server:
        yield server


async def assert_as_good_as_new(served: ServedEngine) -> None:
    await served.engine.resume()
    await served.wait_until_idle(timeout_s=20)
    assert (await served.http.get("/requests")).json() == {"requests": []}
    assert (await served.http.get("/health")).status_code == 200
    body = {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True}
    completion = (await served.http.post("/v1/completions", json=body)).json()
    assert completion["usage"]["completion_tokens"] == 3


# -- from the page ---------------------------------------------------------------------------------


async def fuzz_by_page(
    served: ServedEngine,
    folder: Path,
    *,
    num_examples: int,
    phases: str,
    checks: Sequence[str] = CHECKS,
    choice: str = "--exclude-path",
) -> None:
    """All but the pauses, or only these. Raises AssertionError with what schemathesis found."""
    url = f"http://127.0.0.1:{served.port}"
    process = await asyncio.create_subprocess_exec(
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{url}/openapi.json"),
        *("--url", url, "--checks", ",".join(checks), "--phases", phases),
        *(word for path in PAUSES for word in (choice, path)),
        *("--seed", str(SEED), "--max-examples", str(num_examples), "--request-timeout", "100"),
        *("--no-color", "--generation-database", "none"),
        cwd=folder,
        env=os.environ | {"HYPOTHESIS_STORAGE_DIRECTORY": str(folder)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, output.decode(errors="replace")[-20_000:]
    await assert_as_good_as_new(served)


async def test_L11_requests_made_from_the_page_are_answered_as_it_says(
    bundled: ServedEngine, tmp_path: Path
) -> None:
    await fuzz_by_page(bundled, tmp_path, num_examples=8, phases="fuzzing")


async def test_L9_pauses_made_from_the_page_are_answered_as_it_says(
    bundled: ServedEngine, tmp_path: Path
) -> None:
    """A pause that is given no time is a 504, as the page cannot say of which."""
    checks = [check for check in CHECKS if check != "not_a_server_error"]
    options: dict[str, Any] = {"checks": checks, "choice": "--include-path"}
    await fuzz_by_page(bundled, tmp_path, num_examples=8, phases="fuzzing", **options)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_L11_many_requests_made_from_the_page_are_answered_as_it_says(
    bundled: ServedEngine, tmp_path: Path
) -> None:
    await fuzz_by_page(bundled, tmp_path, num_examples=200, phases="coverage,fuzzing")


# -- from valid bodies -----------------------------------------------------------------------------


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """The ways to all values within, but those that lie very deep."""
    if len(path) > 6:
        return []
    keyed: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        keyed = list(value.items())
    elif isinstance(value, list):
        keyed = list(enumerate(value))
    return [path, *(place for key, inner in keyed for place in places(inner, (*path, key)))]


def mutate(body: dict[str, Any], draw: random.Random) -> bytes:
    """A body that is wrong, or nearly, at one or two places."""
    text = json.dumps(body)
    for _ in range(draw.choice((1, 1, 2))):
        changed: Any = json.loads(text) if _is_json(text) else None
        kind = draw.randrange(8)
        if changed is None or kind == 0:
            cut = draw.randrange(len(text) + 1)
            text = text[:cut] + draw.choice(("", "\0", "}", '"', ",", "\\")) + text[cut + 1 :]
            continue
        if kind == 1 and isinstance(changed, dict) and changed:
            key = draw.choice(list(changed))
            twin = f"{json.dumps(key)}:{draw.choice(WILD)}"
            text = f"{{{twin},{text[1:]}" if draw.random() < 0.5 else f"{text[:-1]},{twin}}}"
            continue
        if kind == 2 and isinstance(changed, dict):
            text = f"{text[:-1]},{json.dumps(draw.choice(list(SAMPLING)))}:{draw.choice(WILD)}}}"
            continue
        text = _replace(changed, draw.choice(places(changed)), draw)
    data = text.encode("utf-8", "surrogatepass")
    return data if draw.random() < 0.97 else data[: len(data) // 2] + b"\xff\xfe" + data


def _replace(value: Any, place: tuple[str | int, ...], draw: random.Random) -> str:
    if not place:
        return draw.choice(WILD)
    holder = value
    for key in place[:-1]:
        holder = holder[key]
    if isinstance(holder, dict) and draw.random() < 0.1:
        del holder[place[-1]]
        return json.dumps(value)
    holder[place[-1]] = "@WILD@"
    return json.dumps(value).replace('"@WILD@"', draw.choice(WILD))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def assert_sensible(answer: httpx.Response, path: str, body: bytes) -> None:
    """A success that is whole, or an error that names a field or says what to do."""
    about = f"{path} {body[:500]!r} -> {answer.status_code} {answer.text[:500]!r}"
    assert answer.status_code in (200, 400, 404), about
    if answer.status_code == 200:
        if answer.headers["content-type"].startswith("text/event-stream"):
            assert answer.text.endswith("data: [DONE]\n\n"), about
        else:
            answer.json()
        return
    error = answer.json()["error"]
    if isinstance(error, str):  # FastDeploy's shape.
        assert "must provide" in error, about
        return
    told = error["message"]
    assert error["param"] is not None or any(word in told for word in REMEDIES), about
    assert len(told) < 1500, about


REMEDIES = (
    *("the body", "can be sent", "expected", "give", "needs", "did you mean", "limit"),
    *("ask for", "must", "takes"),
)


async def fuzz_by_mutation(served: ServedEngine, *, num_mutations: int) -> None:
    draw = random.Random(SEED)
    plan = []
    for _ in range(num_mutations):
        path = draw.choice(list(VALID_BODIES))
        plan.append((path, mutate(draw.choice(VALID_BODIES[path]), draw)))

    async def send_each() -> None:
        while plan:
            path, body = plan.pop()
            assert_sensible(await served.http.post(path, content=body), path, body)

    async with asyncio.TaskGroup() as clients:
        for _ in range(NUM_CLIENTS):
            clients.create_task(send_each())
    await assert_as_good_as_new(served)


@pytest.mark.timeout(110)
async def test_L11_mutations_of_valid_bodies_are_answered_and_leave_nothing(
    served: ServedEngine,
) -> None:
    await fuzz_by_mutation(served, num_mutations=NUM_MUTATIONS)


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_L11_many_mutations_of_valid_bodies_are_answered_and_leave_nothing(
    served: ServedEngine,
) -> None:
    await fuzz_by_mutation(served, num_mutations=100_000)
