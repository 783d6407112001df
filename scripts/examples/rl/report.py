"""What is printed: a line for each round, then a line for each check."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from scripts.examples.rl.checks import TOLERANCE, Checks
from scripts.examples.rl.rollout import Rollout


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundReport:
    """How a round went."""

    number: int
    version: str
    """Of the weights that served."""
    num_new: int
    num_carried: int
    """Rollouts that an earlier round began."""
    num_finished: int
    num_cut: int
    """Rollouts that were live at the cut, and are carried to the next round."""
    tokens: Counter[str]
    """Of the finished rollouts, by the version that sampled them."""
    cut_s: float
    """From the call to abort or pause until it was answered."""
    staging_s: float
    paused_s: float
    """How long the update kept the engines from running; 0 if a pause did so anyway."""
    train_s: float
    """0 in the last round, which trains nothing."""
    reward: float
    """The mean of the finished rollouts."""
    max_difference: float
    """Between log-probabilities of the engine and of transformers, in nats."""


HEADER = (
    "new: begun in this round; carried: begun earlier; cut: live when 80 % were finished\n"
    "round  weights  new  carried  finished  cut   cut ms  train s  staging ms  paused ms"
    "   reward  max |Δlogprob|  tokens of the finished"
)


def print_round(report: RoundReport) -> None:
    if report.number == 1:
        print(HEADER)
    by_version = ", ".join(f"{version} {count}" for version, count in sorted_tokens(report.tokens))
    print(
        f"{report.number:>5}  {report.version:>7}  {report.num_new:>3}  {report.num_carried:>7}"
        f"  {report.num_finished:>8}  {report.num_cut:>3}  {report.cut_s * 1000:>7.1f}"
        f"  {report.train_s:>7.1f}  {report.staging_s * 1000:>10.1f}"
        f"  {report.paused_s * 1000:>9.1f}  {report.reward:>7.3f}"
        f"  {report.max_difference:>14.1e}  {by_version}",
        flush=True,
    )


def sorted_tokens(tokens: Counter[str]) -> list[tuple[str, int]]:
    """By version, the oldest first: v10 comes behind v9."""
    return sorted(tokens.items(), key=lambda item: (len(item[0]), item[0]))


def tokens_by_version(rollouts: Iterable[Rollout]) -> Counter[str]:
    return Counter(version for rollout in rollouts for version in rollout.versions)


def print_checks(checks: Checks, rollouts: Iterable[Rollout]) -> bool:
    """Returns whether all passed."""
    rollouts = list(rollouts)
    num_crossing = sum(len(set(rollout.versions)) > 1 for rollout in rollouts)
    num_aborts = sum(len(rollout.aborted) for rollout in rollouts)
    details = {
        checks.ended: f"{len(rollouts)} rollouts",
        checks.tokens: f"{checks.tokens.num_checked} tokens, {num_aborts} aborts",
        checks.versions: f"{num_crossing} rollouts were sampled by more than one",
        checks.logprobs: f"{checks.logprobs.num_checked} tokens by transformers, off by at most "
        f"{checks.max_difference:.1e} (tolerance {TOLERANCE:.0e})",
    }
    print()
    for check in checks.all:
        verdict = "passed" if check.passed else "FAILED"
        print(f"{verdict}  {check.promise:<47}{details[check]}")
        for failure in check.failures[:3]:
            print(f"        {failure}")
    if checks.num_mixed:
        print(
            f"        {checks.num_mixed} tokens more attended to KV of older weights, which `keep` "
            "leaves as it is:\n        no model gives their log-probabilities; their versions "
            "were checked"
        )
    return all(check.passed for check in checks.all)
