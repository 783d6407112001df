"""The fake runner's weights: an update changes the tokens, and stale KV shows in them."""

from __future__ import annotations

import pytest

from engine_core.fake_runner import FakeRunner, expected_tokens, salt_of, token_behind
from ipc.weights import WeightSource
from tests.support.scripted_batching import ScriptedBatching

PROMPT = [11, 12, 13, 14, 15]
NEW = WeightSource(kind="disk", path="/weights/7")


def make_runner() -> FakeRunner:
    return FakeRunner(num_blocks=32, block_size=4, max_num_seqs=4, max_model_len=64)


def update(runner: FakeRunner, *sources: WeightSource) -> None:
    staged = None
    for source in sources:
        staged = runner.stage(source, staged)
    assert staged is not None
    runner.commit(staged)


def run_with(runner: FakeRunner, num_outputs: int) -> list[int]:
    runs = ScriptedBatching(runner, 4, 4)
    sequence = runs.join(PROMPT)
    runs.run(num_outputs)
    return sequence.outputs


def test_an_update_changes_the_tokens_only_when_it_is_committed() -> None:
    runner = make_runner()
    before = expected_tokens(PROMPT, 9)
    assert run_with(runner, 9) == before
    staged = runner.stage(NEW, None)
    assert run_with(runner, 9) == before
    runner.commit(staged)
    after = run_with(runner, 9)
    assert after == expected_tokens(PROMPT, 9, salt=salt_of(NEW.path))
    assert all(a != b for a, b in zip(after, before, strict=True))


def test_the_parts_of_an_update_add_up() -> None:
    runner = make_runner()
    parts = [WeightSource(kind="file", path=path) for path in ("/a", "/b")]
    update(runner, *parts)
    assert run_with(runner, 4) == expected_tokens(PROMPT, 4, salt=salt_of("/a", "/b"))


def test_kv_that_outlives_an_update_shows_as_token_behind_says() -> None:
    runner, salt = make_runner(), salt_of(NEW.path)
    runs = ScriptedBatching(runner, 4, 4)
    sequence = runs.join(PROMPT)
    runs.step()
    runs.step()
    update(runner, NEW)
    runs.run(8)
    context, cell_salts = list(PROMPT), [0] * (len(PROMPT) + 1) + [salt] * 8
    for index in range(8):
        context.append(token_behind(context, cell_salts, salt if index >= 2 else 0))
    assert sequence.outputs == context[len(PROMPT) :]
    fresh = expected_tokens(PROMPT + sequence.outputs[:2], 6, salt=salt)
    assert sequence.outputs[2:] != fresh


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (WeightSource(kind="disk", path="/missing/weights"), "there are no such weights"),
        (WeightSource(kind="file", path="/weights/7", checksum="ab"), "checksum='ab'"),
        (WeightSource(kind="broadcast", group_name="trainer"), "no broadcast"),
    ],
)
def test_what_does_not_fit_is_refused(source: WeightSource, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        make_runner().stage(source, None)
