"""An engine tells who left it: each end is confirmed to its own client, blocks back; an ABORT frame
has it told once more.
"""

from __future__ import annotations

from engine_core.core import Input
from engine_core.fake_runner import expected_tokens
from ipc.abort import Abort
from ipc.codec import pack
from ipc.frames import InputError
from ipc.output import FinishReason, encode_outputs
from ipc.utility import UtilityCall
from tests.support.core_driver import CoreDriver


def running(driver: CoreDriver, *request_ids: str) -> None:
    for request_id in request_ids:
        driver.add(request_id, list(range(10)), max_tokens=50)
    driver.step()
    driver.step()


def test_L5_L11_an_abort_frame_is_confirmed_at_its_boundary_once_the_blocks_have_left() -> None:
    driver = CoreDriver()
    running(driver, "gone", "stays")
    pool = driver.core.scheduler.pool
    num_available = pool.num_available
    (frame,) = driver.abort("gone")
    assert frame.finished_requests == ["gone"]
    assert not frame.outputs
    assert frame.scheduler_stats is None
    assert pool.num_available > num_available
    driver.run()
    assert driver.confirmed == [(0, "gone"), (0, "stays")]


def test_L7_a_storm_is_confirmed_in_one_frame() -> None:
    driver = CoreDriver()
    names = [f"r{number}" for number in range(20)]
    for name in names:
        driver.add(name, [1], max_tokens=9)
    driver.step()
    (frame,) = driver.abort(*names)
    assert frame.finished_requests == names
    assert frame.scheduler_stats is not None, "the statistics of the idle engine ride along"


def test_L1_L8_an_abort_frame_has_the_end_of_requests_that_are_gone_confirmed_again() -> None:
    driver = CoreDriver()
    driver.add("ended", [1], max_tokens=1)
    running(driver, "dropped", "stays")
    (frame,) = driver.abort("dropped", "dropped", "ended", "never was")
    assert frame.finished_requests == ["dropped", "ended", "never was"], "each once a frame"
    assert not frame.outputs
    (frame,) = driver.abort("dropped")
    assert frame.finished_requests == ["dropped"]
    assert driver.core.counters["requests_aborted"] == 1
    assert list(driver.live_requests()) == ["stays"]


def test_L8_the_end_of_an_earlier_request_is_not_told_of_a_live_one_with_its_id() -> None:
    driver = CoreDriver()
    running(driver, "a")
    driver.abort("a")
    assert driver.add("a", [5], max_tokens=9) == []
    (frame,) = driver.step()
    assert frame.finished_requests is None
    assert list(driver.live_requests()) == ["a"]


def test_L8_a_second_add_of_a_live_id_confirms_nothing() -> None:
    driver = CoreDriver()
    running(driver, "a")
    assert driver.add("a", [5], max_tokens=1) == []
    driver.apply(InputError("bad field", request_id="a", client_index=0))
    assert driver.confirmed == []


def test_L1_an_end_by_itself_or_by_a_call_is_confirmed_with_its_terminal_and_before_the_reply() -> (
    None
):
    driver = CoreDriver()
    driver.add("natural", [1], max_tokens=2)
    driver.add("called", [1], max_tokens=50)
    (first,) = driver.step()
    assert first.finished_requests is None
    (second,) = driver.step()
    assert second.finished_requests == ["natural"]
    assert second.outputs[0].finish_reason is FinishReason.LENGTH
    terminal, reply = driver.apply(UtilityCall(0, 7, "caesura_abort", (["called"], "test")))[:2]
    assert terminal.outputs[0].finish_reason is FinishReason.ABORT
    assert terminal.finished_requests == ["called"]
    assert reply.utility_output is not None
    assert reply.finished_requests is None


def test_L1_ends_between_two_replies_of_a_boundary_are_each_confirmed_once() -> None:
    driver = CoreDriver()
    running(driver, "a", "b")
    question = UtilityCall(0, 7, "is_sleeping", ())
    inputs: list[Input] = [Abort(("a",)), question, Abort(("b",)), question]
    outgoing = driver.core.apply([(0, message) for message in inputs], driver.now)
    assert [frame.finished_requests for _, frame in outgoing[:4]] == [["a"], None, ["b"], None]
    assert all(frame.finished_requests is None for _, frame in outgoing[4:])


def test_L1_a_refused_request_is_confirmed_with_its_refusal() -> None:
    driver = CoreDriver()
    (refused,) = driver.add("empty", [], max_tokens=2)
    (malformed,) = driver.apply(InputError("bad field", request_id="odd", client_index=0))
    assert refused.finished_requests == ["empty"]
    assert malformed.finished_requests == ["odd"]


def test_L12_an_id_of_another_client_is_confirmed_to_the_asker_alone_and_lives_on() -> None:
    driver = CoreDriver()
    driver.add("a", [1], max_tokens=9)
    driver.add("b", [1], max_tokens=3, client_index=1)
    driver.step()
    driver.abort("a", "b")
    assert driver.confirmed == [(0, "a"), (0, "b")]
    assert list(driver.live_requests(client_index=1)) == ["b"]
    driver.run()
    assert driver.confirmed == [(0, "a"), (0, "b"), (1, "b")]
    assert driver.finish_reasons("b") == [FinishReason.LENGTH]
    assert driver.tokens["b"] == expected_tokens([1], 3)


def test_a_frame_in_which_nobody_ends_is_not_a_byte_longer() -> None:
    driver = CoreDriver()
    running(driver, "a")
    (frame,) = driver.step()
    rows = [["a", list(frame.outputs[0].new_token_ids)]]
    body = [0, rows, None, driver.now, None, None, None, None, "default"]
    assert encode_outputs(frame) == [pack(body)]


# ── who is live ───────────────────────────────────────────────────────────────────────────────────


def test_the_live_requests_are_listed_by_stage_with_their_tokens_and_preemptions() -> None:
    driver = CoreDriver(max_num_batched_tokens=16, max_num_seqs=3, num_blocks=64)
    driver.add("decoding", [1], max_tokens=50)
    driver.step()
    driver.add("prefilling", list(range(60)), max_tokens=50)
    driver.step()
    driver.add("waiting", [1], max_tokens=50)
    driver.add("another client's", [1], max_tokens=50, client_index=1)
    listed = driver.live_requests()
    assert list(listed) == ["decoding", "prefilling", "waiting"]
    assert [one.stage for one in listed.values()] == ["decode", "prefill", "waiting"]
    assert [one.num_output_tokens for one in listed.values()] == [2, 0, 0]
    assert [one.num_preemptions for one in listed.values()] == [0, 0, 0]
    assert list(driver.live_requests(client_index=1)) == ["another client's"]
    driver.abort("decoding")
    assert list(driver.live_requests()) == ["prefilling", "waiting"]


def test_a_request_that_gave_up_its_blocks_is_listed_as_preempted() -> None:
    driver = CoreDriver(max_num_batched_tokens=16, num_blocks=64)
    driver.add("hungry", [7] * 10, max_tokens=230, priority=-1)
    driver.add("victim", [1, 2, 3], max_tokens=200)
    while driver.core.scheduler.num_preemptions == 0:
        driver.step()
    victim = driver.live_requests()["victim"]
    assert (victim.stage, victim.num_preemptions) == ("preempted", 1)
    assert victim.num_output_tokens == len(driver.tokens["victim"]) > 0
    assert driver.live_requests()["hungry"].num_preemptions == 0


def test_L12_a_list_that_is_asked_for_with_arguments_fails_and_harms_nothing() -> None:
    driver = CoreDriver()
    running(driver, "a")
    assert driver.call("caesura_requests", "all").failure_message is not None
    assert list(driver.live_requests()) == ["a"]


def test_the_status_counts_what_was_computed_and_what_the_prefix_cache_gave() -> None:
    driver = CoreDriver()
    prompt = list(range(10))
    driver.add("a", prompt, max_tokens=3)
    driver.run()
    counters = driver.status().counters
    assert counters["tokens_computed"] == 10 + 2
    assert counters["prefix_cache_queried_tokens"] == 10
    assert counters["prefix_cache_hit_tokens"] == 0
    driver.add("b", prompt, max_tokens=1)
    driver.run()
    counters = driver.status().counters
    assert counters["tokens_computed"] == 12 + 2
    assert counters["prefix_cache_queried_tokens"] == 20
    assert counters["prefix_cache_hit_tokens"] == 8
