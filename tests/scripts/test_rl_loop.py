"""The RL example does what it shows, in each mode and over each transport, and its checks can fail.

Real engines, real training, real updates; only the numbers are small. What the checks are worth is
seen when something is spoilt behind their back: each must then fail, and for that alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import Callable

import pytest

from ipc.logs import LEVEL_VARIABLE
from scripts.examples.rl.checks import Checks
from scripts.examples.rl.report import print_checks
from scripts.examples.rl.rollout import Rollout, versions_of
from scripts.examples.rl_loop import Plan, RlLoop, main, run

SMALL = Plan(rounds=3, prompts=4, group=4, finish_share=0.5)
TIMEOUT_S = 100


def run_small(plan: Plan) -> RlLoop:
    return asyncio.run(asyncio.wait_for(run(plan), TIMEOUT_S))


@pytest.fixture(scope="module")
def aborting() -> RlLoop:
    """A loop that aborted, updated and resumed."""
    return run_small(SMALL)


def assert_all_was_checked(loop: RlLoop) -> None:
    assert print_checks(loop.checks, loop.rollouts), "a check failed"
    num_tokens = sum(len(rollout.token_ids) for rollout in loop.rollouts)
    assert loop.checks.ended.num_checked == len(loop.rollouts)
    assert loop.checks.tokens.num_checked == loop.checks.versions.num_checked == num_tokens
    assert loop.checks.logprobs.num_checked + loop.checks.num_mixed == num_tokens


def num_crossing(loop: RlLoop) -> int:
    return sum(len(set(rollout.versions)) > 1 for rollout in loop.rollouts)


def test_L10_aborted_rollouts_go_on_under_new_weights_and_every_token_is_judged(
    aborting: RlLoop,
) -> None:
    assert_all_was_checked(aborting)
    assert num_crossing(aborting) > 0
    assert any(rollout.aborted for rollout in aborting.rollouts)
    assert aborting.checks.num_mixed == 0


def test_L9_L10_retracted_rollouts_cross_an_update_and_every_token_is_judged() -> None:
    loop = run_small(dataclasses.replace(SMALL, rounds=2, mode="retract", transport="tensors"))
    assert_all_was_checked(loop)
    assert num_crossing(loop) > 0
    assert not any(rollout.aborted for rollout in loop.rollouts)
    assert loop.checks.num_mixed == 0


def test_L9_L10_kept_rollouts_cross_an_update_and_the_report_says_what_could_not_be_judged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--mode keep --transport broadcast --engines 2 --rounds 2 --prompts 8"
    monkeypatch.setattr(sys, "argv", ["rl_loop", *flags.split()])
    monkeypatch.setenv(LEVEL_VARIABLE, "WARNING")
    assert main() == 0
    printed = capsys.readouterr().out
    assert printed.count("\npassed  ") == 4
    assert "FAILED" not in printed
    assert "tokens more attended to KV of older weights" in printed


# -- sabotage ----------------------------------------------------------------------------------


def judged_anew(loop: RlLoop, spoil: Callable[[Rollout], None] = lambda _: None) -> Checks:
    """Judge the loop's rollouts again, with one spoilt that was aborted and resumed."""
    rollouts = [
        dataclasses.replace(
            rollout,
            reading=None,
            _stream=None,
            token_ids=list(rollout.token_ids),
            logprobs=list(rollout.logprobs),
            versions=list(rollout.versions),
        )
        for rollout in loop.trained_on
    ]
    spoil(next(rollout for rollout in rollouts if len(set(rollout.versions)) > 1))
    checks = Checks(loop.reference, "abort", SMALL.max_tokens)
    checks.add(rollouts)
    checks.finish(rollouts, rollouts)
    return checks


def failed(checks: Checks) -> list[str]:
    return [check.promise for check in checks.all if not check.passed]


def test_rollouts_that_are_left_alone_pass_again(aborting: RlLoop) -> None:
    assert failed(judged_anew(aborting)) == []


def test_the_weights_of_another_version_do_not_pass(
    aborting: RlLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = aborting.reference._weights
    swapped = {**weights, "v0": weights["v1"], "v1": weights["v0"]}
    monkeypatch.setattr(aborting.reference, "_weights", swapped)
    checks = judged_anew(aborting)
    assert failed(checks) == [checks.logprobs.promise]
    assert not print_checks(checks, aborting.rollouts)


def test_a_version_that_changes_one_token_too_late_does_not_pass(aborting: RlLoop) -> None:
    def spoil(rollout: Rollout) -> None:
        boundary = rollout.versions.index(rollout.versions[-1])
        rollout.versions[boundary] = rollout.versions[boundary - 1]

    checks = judged_anew(aborting, spoil)
    assert checks.versions.promise in failed(checks)


def test_a_lost_token_does_not_pass(aborting: RlLoop) -> None:
    def spoil(rollout: Rollout) -> None:
        for values in (rollout.token_ids, rollout.logprobs, rollout.versions):
            del values[0]

    checks = judged_anew(aborting, spoil)
    assert checks.tokens.promise in failed(checks)
    assert checks.logprobs.promise in failed(checks)


def test_a_rollout_that_never_came_back_does_not_pass(aborting: RlLoop) -> None:
    checks = judged_anew(aborting)
    checks.finish(aborting.rollouts, aborting.trained_on[1:])
    assert failed(checks) == [checks.ended.promise]


def test_a_check_that_looked_at_nothing_does_not_pass(aborting: RlLoop) -> None:
    assert len(failed(Checks(aborting.reference, "abort", SMALL.max_tokens))) == 4


def test_a_token_that_no_span_names_has_no_version() -> None:
    assert versions_of((), 2) == ["?", "?"]
