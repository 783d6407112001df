"""Reinforcement learning on the bundled model: rollouts, cuts, training, weight updates.

    python -m scripts.examples.rl_loop                      # abort and resume; weights through disk
    python -m scripts.examples.rl_loop --mode keep --transport broadcast --engines 2

A round has so many rollouts in flight. When 80 % of them are done, the rest is cut; the finished
ones train the policy, its new weights reach the engines, and the cut ones go on under them, next to
new rollouts. What a cut does is `--mode`:

    abort     they end, with their tokens and a `resume_from` that is sent back to go on
    keep      they stand still, with their KV, until training and update are over
    retract   likewise, but their KV is freed, and computed anew under the new weights

Nothing is taken on trust: each token's version is compared with the loop's own account, and each
log-probability with what transformers makes of it under the weights of that version. The exit
status is 1 if a check fails. It takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

from caesura import AsyncEngine, EngineConfig, FrontendConfig, SamplingParams
from frontend.config import BUNDLED_MODEL_DIRECTORY
from frontend.weights.update import WeightUpdateReport
from ipc.logs import LEVEL_VARIABLE
from scripts.examples.rl.checks import Checks, Reference
from scripts.examples.rl.report import RoundReport, print_checks, print_round, tokens_by_version
from scripts.examples.rl.rollout import TAG, Rollout
from scripts.examples.rl.trainer import Trainer
from scripts.examples.rl.transports import TRANSPORTS, Send, Transport

Mode = Literal["abort", "keep", "retract"]
VERBS = ("read", "write", "parse", "find", "open", "close", "load", "save")
NOUNS = ("file", "name", "value", "header")
PROMPTS = [f'def {verb}_{noun}(self):\n    """' for verb, noun in product(VERBS, NOUNS)]

MAX_TOKENS = 4096
"""Half of the bundled model's context, whatever the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is asked for."""

    rounds: int = 6
    prompts: int = 16
    group: int = 4
    """Rollouts of one prompt."""
    max_tokens: int = 96
    """A rollout ends at a blank line, or here."""
    finish_share: float = 0.8
    """Of the rollouts in flight; the rest is cut. The last round waits for all of them."""
    mode: Mode = "abort"
    transport: Transport = "disk"
    engines: int = 1
    model: Path = BUNDLED_MODEL_DIRECTORY

    def __post_init__(self) -> None:
        for name in ("rounds", "prompts", "group", "max_tokens", "engines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_tokens > MAX_TOKENS:
            raise ValueError(f"max_tokens={self.max_tokens} must be at most {MAX_TOKENS}")
        if self.prompts > len(PROMPTS):
            raise ValueError(f"prompts={self.prompts}, but there are {len(PROMPTS)}; take fewer")

    @property
    def num_in_flight(self) -> int:
        return self.prompts * self.group


class RlLoop:
    """The loop. `rollouts` are all that were ever started, `trained_on` those that finished."""

    def __init__(self, plan: Plan, engine: AsyncEngine, trainer: Trainer, send: Send) -> None:
        self.plan = plan
        self.reference = Reference(plan.model)
        self.checks = Checks(self.reference, plan.mode, plan.max_tokens)
        self.rollouts: list[Rollout] = []
        self.trained_on: list[Rollout] = []
        self._engine = engine
        self._trainer = trainer
        self._send = send
        self._prompts = [trainer.tokenizer(text).input_ids for text in PROMPTS[: plan.prompts]]
        # Log-probabilities are of the model itself, which at temperature 1 is what is sampled from.
        self._sampling = SamplingParams(max_tokens=plan.max_tokens, stop=["\n\n"], logprobs=0)

    async def run(self) -> list[RoundReport]:
        """All rounds; prints as it goes."""
        await self._engine.set_weight_version("v0")
        self.reference.remember("v0", self._trainer.weights())
        reports = []
        unfinished: list[Rollout] = []
        for number in range(self.plan.rounds):
            report, unfinished = await self._round(number, unfinished)
            print_round(report)
            reports.append(report)
        self.checks.finish(self.rollouts, self.trained_on)
        return reports

    async def _round(
        self, number: int, carried: Sequence[Rollout]
    ) -> tuple[RoundReport, list[Rollout]]:
        """Returns also the rollouts that are not finished."""
        version, is_last = f"v{number}", number == self.plan.rounds - 1
        if self.plan.mode == "abort":
            for rollout in carried:
                self._start(rollout)
        new = [self._new_rollout() for _ in range(self.plan.num_in_flight - len(carried))]
        in_flight = [*carried, *new]
        await wait_for_share(in_flight, 1.0 if is_last else self.plan.finish_share)

        cut_s = 0.0 if is_last else await self._cut(in_flight)
        for rollout in in_flight:
            rollout.note(version)
        finished = [rollout for rollout in in_flight if rollout.is_finished]
        unfinished = [rollout for rollout in in_flight if not rollout.is_finished]
        self.trained_on += finished

        max_difference = await asyncio.to_thread(self.checks.add, finished)
        rewards = self._trainer.rewards(finished)
        train_s = staging_s = paused_s = 0.0
        if not is_last:
            train_s = await self._train(finished, rewards)
            update = await self._update(f"v{number + 1}")
            staging_s, paused_s = update.staging_s, update.paused_s
            await self._engine.resume()  # Does nothing where the cut was an abort.
        report = RoundReport(
            number=number + 1,
            version=version,
            num_new=len(new),
            num_carried=len(carried),
            num_finished=len(finished),
            num_cut=len(unfinished),
            tokens=tokens_by_version(finished),
            cut_s=cut_s,
            staging_s=staging_s,
            paused_s=paused_s,
            train_s=train_s,
            reward=sum(rewards) / len(rewards),
            max_difference=max_difference,
        )
        return report, unfinished

    def _new_rollout(self) -> Rollout:
        index = len(self.rollouts)
        prompt_index = index // self.plan.group % self.plan.prompts
        rollout = Rollout(
            prompt_index=prompt_index, prompt_token_ids=self._prompts[prompt_index], seed=index
        )
        self.rollouts.append(rollout)
        self._start(rollout)
        return rollout

    def _start(self, rollout: Rollout) -> None:
        rollout.start(self._engine, dataclasses.replace(self._sampling, seed=rollout.seed))

    async def _cut(self, in_flight: Sequence[Rollout]) -> float:
        """Stop what is not done; returns how long that took, in seconds. Afterwards nothing runs,
        and all that was sampled has arrived.
        """
        started = time.perf_counter()
        if self.plan.mode == "abort":
            await self._engine.abort(tag=TAG)
            cut_s = time.perf_counter() - started
            await wait_for_share(in_flight, 1.0)  # All have ended; their readers may lag behind.
        else:
            await self._engine.pause(self.plan.mode)
            cut_s = time.perf_counter() - started
        return cut_s

    async def _train(self, finished: Sequence[Rollout], rewards: Sequence[float]) -> float:
        """Returns how long it took, in seconds."""
        started = time.perf_counter()
        # On a thread: the event loop must go on, or engines would take us for dead.
        await asyncio.to_thread(self._trainer.step, finished, rewards)
        return time.perf_counter() - started

    async def _update(self, version: str) -> WeightUpdateReport:
        """Have the engines serve the policy as it is now. Paused engines stay paused."""
        weights = self._trainer.weights()
        self.reference.remember(version, weights)
        return await self._send(weights, version)


async def wait_for_share(rollouts: Sequence[Rollout], share: float) -> None:
    """Return when this share of the rollouts is done, or more."""
    running = {rollout.reading for rollout in rollouts if rollout.reading is not None}
    num_left = len(running) - math.ceil(share * len(running))
    while len(running) > num_left:
        done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # An error in reading is ours too.


async def run(plan: Plan) -> RlLoop:
    """Start the engines and run the loop; its `checks` say whether all is well."""
    config = FrontendConfig(
        engine=EngineConfig(model=str(plan.model), dtype="float32", deterministic=True),
        data_parallel_size=plan.engines,
    )
    trainer = Trainer(plan.model)
    async with await AsyncEngine.start(config) as engine:
        async with TRANSPORTS[plan.transport](engine) as send:
            loop = RlLoop(plan, engine, trainer, send)
            await loop.run()
    return loop


def main() -> int:
    """Returns the exit status."""
    plan = Plan()
    parser = argparse.ArgumentParser(
        description="Reinforcement learning on the bundled model.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=plan.rounds, help="updates and one")
    parser.add_argument("--prompts", type=int, default=plan.prompts, help="at most 32")
    parser.add_argument("--group", type=int, default=plan.group, help="rollouts of one prompt")
    parser.add_argument("--max-tokens", type=int, default=plan.max_tokens, help="of a rollout")
    parser.add_argument(
        "--mode", choices=get_args(Mode), default=plan.mode, help="what a cut does to rollouts"
    )
    parser.add_argument(
        "--transport",
        choices=get_args(Transport),
        default=plan.transport,
        help="how new weights reach the engines",
    )
    parser.add_argument("--engines", type=int, default=plan.engines, help="data-parallel engines")
    try:
        plan = Plan(**vars(parser.parse_args()))
    except ValueError as error:
        parser.error(str(error))
    # The engines' own account of every abort would fill the screen.
    os.environ.setdefault(LEVEL_VARIABLE, "WARNING")
    loop = asyncio.run(run(plan))
    return 0 if print_checks(loop.checks, loop.rollouts) else 1


if __name__ == "__main__":
    sys.exit(main())
