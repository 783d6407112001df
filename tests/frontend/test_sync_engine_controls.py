"""Pauses, weight updates and continued requests through the synchronous engine, under SGLang's
names, over a real engine process whose tokens are arithmetic."""

from __future__ import annotations

import concurrent.futures
import json
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from engine_core.fake_runner import expected_tokens, salt_of
from frontend.errors import InvalidRequestError, PauseConflictError
from frontend.sync.engine import Engine
from frontend.sync.tensors import safetensors_bytes
from tests.support.sync_engines import (
    ENDLESS,
    WAIT_S,
    assert_nothing_runs,
    fake_config,
    num_running_in_engine,
    wait_until,
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(config=fake_config()) as running:
        yield running


@pytest.fixture
def pool() -> Iterator[concurrent.futures.ThreadPoolExecutor]:
    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        yield threads


# -- pauses ----------------------------------------------------------------------------------------


def test_L9_requests_frozen_in_place_go_on_and_newcomers_run_after_the_pause(
    engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    params = {"max_new_tokens": 100, "ignore_eos": True}
    kept = pool.submit(engine.generate, None, params, [5])
    wait_until(lambda: num_running_in_engine(engine) == 1)
    report = engine.pause_generation("in_place", pause_id="mine")
    assert (report.state, report.num_kept) == ("paused", 1)
    newcomer = pool.submit(engine.generate, None, params, [6])
    assert not concurrent.futures.wait([kept, newcomer], 0.1).done
    assert not engine.flush_cache().success
    with pytest.raises(PauseConflictError):
        engine.continue_generation("another")
    assert engine.continue_generation("mine").was == "paused"
    assert kept.result(WAIT_S)["output_ids"] == expected_tokens([5], 100)
    assert newcomer.result(WAIT_S)["output_ids"] == expected_tokens([6], 100)
    assert engine.flush_cache().success


def test_L9_an_abort_pause_ends_requests_and_their_results_can_be_continued(
    engine: Engine, pool: concurrent.futures.ThreadPoolExecutor
) -> None:
    params = {"max_new_tokens": 200, "ignore_eos": True}
    calls = [pool.submit(engine.generate, None, params, [[n], [n + 9]]) for n in range(1, 4)]
    wait_until(lambda: num_running_in_engine(engine) == 6)
    report = engine.pause_generation()
    assert report.num_aborted == 6
    results = [result for call in calls for result in call.result(WAIT_S)]
    engine.continue_generation()
    origins = [result["meta_info"]["resume_from"] for result in results]
    assert json.loads(json.dumps(origins)) == origins
    rest = engine.generate(resume_from=origins, sampling_params={"ignore_eos": True})
    for part, whole, n in zip(rest, results, [1, 10, 2, 11, 3, 12], strict=True):
        assert whole["meta_info"]["finish_reason"]["abort_cause"] == "pause"
        assert whole["output_ids"] + part["output_ids"] == expected_tokens([n], 200)
        assert part["meta_info"]["prompt_tokens"] == 1
        assert part["meta_info"]["completion_tokens"] == len(part["output_ids"])
        assert "resume_from" not in part["meta_info"]
    assert_nothing_runs(engine)


async def test_a_result_is_continued_by_async_generate_and_in_a_stream(engine: Engine) -> None:
    stream = engine.generate(input_ids=[5], sampling_params=ENDLESS, rid="a", stream=True)
    next(stream)
    engine.abort_request("a")
    *_, aborted = stream
    origin = aborted["meta_info"]["resume_from"]
    ten = {"max_new_tokens": 10, "ignore_eos": True}
    whole = await engine.async_generate(resume_from=origin, sampling_params=ten)
    streamed = [
        result
        async for result in await engine.async_generate(
            resume_from=origin, sampling_params=ten, stream=True
        )
    ]
    num_before = len(aborted["output_ids"])
    for result in (whole, streamed[-1]):
        assert result["output_ids"] == expected_tokens([5], num_before + 10)[num_before:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"input_ids": [5]}, "one of them"),
        ({"sampling_params": {"n": 2}}, "n=2 cannot be had with resume_from"),
        ({"sampling_params": {"max_new_tokens": 0}}, "max_new_tokens=0 cannot be had"),
        ({"return_logprob": True, "logprob_start_len": 0}, "prompt_logprobs"),
    ],
)
def test_what_cannot_be_had_of_a_continued_request_is_refused(
    engine: Engine, arguments: dict[str, Any], message: str
) -> None:
    origin = {
        "prompt_token_ids": [5],
        "output_token_ids": [6],
        "num_output_tokens_left": 4,
        "position": 2,
    }
    with pytest.raises(InvalidRequestError, match=message):
        engine.generate(resume_from=origin, **arguments)
    with pytest.raises(InvalidRequestError, match="unknown key 'x'"):
        engine.generate(resume_from=[origin | {"x": 1}])


def test_a_pause_mode_that_is_none_is_refused(engine: Engine) -> None:
    with pytest.raises(InvalidRequestError, match="mode='keep' is none of abort, retract"):
        engine.pause_generation("keep")  # type: ignore[arg-type]


# -- weights ---------------------------------------------------------------------------------------


def test_L10_an_update_from_disk_changes_tokens_label_and_spans() -> None:
    with Engine(config=fake_config()) as engine:
        params = {"max_new_tokens": 5}
        assert engine.update_weights_from_disk("w2", weight_version="v2") == (
            True,
            "the weights were updated",
            0,
        )
        result = engine.generate(None, params, [5])
        assert result["output_ids"] == expected_tokens([5], 5, salt=salt_of("w2"))
        assert result["meta_info"]["weight_version"] == "v2"
        spans = [{"version": "v2", "start": 0, "end": 5}]
        assert result["meta_info"]["weight_versions"] == spans

        success, message, _ = engine.update_weights_from_disk("missing", weight_version="v3")
        assert not success
        assert "missing" in message
        assert engine.generate(None, params, [5])["output_ids"] == result["output_ids"]
        assert engine.generate(None, params, [5])["meta_info"]["weight_version"] == "v2"


def test_L10_a_stream_tells_the_label_of_now_and_its_end_where_it_changed(
    engine: Engine,
) -> None:
    params = {"max_new_tokens": 150, "ignore_eos": True}
    stream = engine.generate(None, params, [5], stream=True)
    first = next(stream)
    before = first["meta_info"]["weight_version"]
    assert "weight_versions" not in first["meta_info"]
    num_before = len(first["output_ids"])
    success, _, _ = engine.update_weights_from_disk("other", weight_version="next", mode="in_place")
    assert success
    *_, last = stream
    info = last["meta_info"]
    assert info["weight_version"] == "next"
    old, new = info["weight_versions"]
    assert (old["version"], old["start"], new["version"], new["end"]) == (before, 0, "next", 150)
    assert num_before <= old["end"] == new["start"]
    assert last["output_ids"][: old["end"]] == expected_tokens([5], old["end"])


def test_L10_parts_of_an_update_take_effect_together_at_its_end(engine: Engine) -> None:
    before = engine.generate(None, {"max_new_tokens": 3}, [5])["output_ids"]
    assert not engine.end_weight_update()[0]
    assert engine.begin_weight_update()[0]
    success, message = engine.begin_weight_update()
    assert not success
    assert message
    assert engine.update_weights_from_tensor([("a", np.ones(2, np.float32))])[0]
    assert engine.generate(None, {"max_new_tokens": 3}, [5])["output_ids"] == before
    assert engine.update_weights_from_tensor([("b", np.ones(2, np.float32))])[0]
    assert engine.end_weight_update(weight_version="parts")[0]
    after = engine.generate(None, {"max_new_tokens": 3}, [5])
    assert after["output_ids"] != before
    assert after["meta_info"]["weight_version"] == "parts"
    assert not engine.discard_weight_update()


def test_a_group_that_engines_cannot_join_is_told_and_not_raised(engine: Engine) -> None:
    success, message = engine.init_weights_update_group("127.0.0.1", 1, 1, 2, backend="gloo")
    assert not success
    assert "group" in message
    success, message = engine.update_weights_from_distributed(["a"], ["float32"], [[2]])
    assert not success
    assert not engine.destroy_weights_update_group()[0]


def test_the_first_label_is_the_keyword_of_sglang() -> None:
    with Engine(context_length=64, weight_version="seven") as engine:
        info = engine.generate("def ", {"max_new_tokens": 2})["meta_info"]
        assert info["weight_version"] == "seven"
        assert info["weight_versions"] == [{"version": "seven", "start": 0, "end": 2}]


# -- tensors ---------------------------------------------------------------------------------------


def test_tensors_of_any_layout_become_a_safetensors_file() -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    loaded = safetensors.numpy.load(safetensors_bytes([("a", array.T), ("b", array[:, 1])]))
    assert (loaded["a"] == array.T).all()
    assert (loaded["b"] == array[:, 1]).all()


def test_tensors_of_pytorch_may_share_memory() -> None:
    torch = pytest.importorskip("torch")
    flat = torch.arange(8, dtype=torch.float32, requires_grad=True)
    named = [("a", flat[:4].view(2, 2).T), ("b", flat[4:]), ("tied", flat[4:])]
    loaded = safetensors.numpy.load(safetensors_bytes(named))
    assert loaded["a"].tolist() == [[0, 2], [1, 3]]
    assert loaded["b"].tolist() == loaded["tied"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("named_tensors", "message"),
    [
        ([], "empty"),
        ([("a", [1.0])], "'a' is a list"),
        ([("a", np.ones(1)), ("a", np.ones(1))], "'a' twice"),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(named_tensors: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        safetensors_bytes(named_tensors)


def test_tensors_of_both_kinds_are_refused() -> None:
    torch = pytest.importorskip("torch")
    assert "torch" in sys.modules
    with pytest.raises(InvalidRequestError, match="mixes"):
        safetensors_bytes([("a", np.ones(1)), ("b", torch.ones(1))])
