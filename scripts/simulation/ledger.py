"""An engine's side of the contract, kept by its inputs and checked against its outputs and its
insides.

Invariants that are checked
- A request is live from its ADD until its terminal, or until an ABORT frame names it; the core
  knows exactly the live ones, and so does its scheduler.
- Each output token is the one that the context demands, computed under the present weights over
  cells that were written under those of their time; a request ends exactly when it should.
- An aborted one ends with one terminal without tokens; its receipt comes behind it, tells its stage
  and tokens truly, and when it leaves nothing of the request is in the engine.
- An end is confirmed only when the request holds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from engine_core.core import EngineCore, Input
from engine_core.jobs import JobDone
from engine_core.validation import NUM_RESUMED_TOKENS
from ipc.abort import Abort
from ipc.lifecycle import CAESURA_ABORT, CAESURA_STATUS, EngineStatus
from ipc.output import EngineCoreOutput, EngineCoreOutputs, FinishReason
from ipc.pause import CAESURA_PAUSE, CAESURA_RESUME
from ipc.request import EngineCoreRequest
from ipc.utility import UtilityCall, UtilityReply
from ipc.weights import CAESURA_COMMIT_WEIGHTS, CAESURA_DISCARD_WEIGHTS, CAESURA_STAGE_WEIGHTS
from scripts.simulation.engine import TimedRunner
from scripts.simulation.engine_aborts import EngineAborts
from scripts.simulation.engine_pauses import EnginePauses, Violate
from scripts.simulation.engine_steps import EngineSteps
from scripts.simulation.engine_weights import EngineWeights
from scripts.simulation.ledger_request import LedgerRequest
from scripts.simulation.oracle import next_token


@dataclass(slots=True)
class Ledger:
    """The books of one engine."""

    rank: int
    core: EngineCore
    runner: TimedRunner
    violate: Violate
    pauses: EnginePauses = field(init=False)
    weights: EngineWeights = field(init=False)
    aborts: EngineAborts = field(init=False)
    steps: EngineSteps = field(init=False)
    live: dict[str, LedgerRequest] = field(default_factory=dict)
    tokens: dict[str, list[int]] = field(default_factory=dict)
    """What every request that ever was has sampled."""
    labels: dict[str, list[str]] = field(default_factory=dict)
    """Of the weights under which each of these tokens was."""
    confirmed: set[str] = field(default_factory=set)
    _owed: set[int] = field(default_factory=set)
    """Calls that must be answered in this turn."""
    _statuses: dict[int, tuple[object, ...]] = field(default_factory=dict)
    """By call: what it must be told."""

    def __post_init__(self) -> None:
        self.pauses = EnginePauses(self.rank, self.core, self.live, self.violate)
        self.weights = EngineWeights(self.rank, self.core, self.violate)
        self.aborts = EngineAborts(self)
        self.steps = EngineSteps(self)

    def stage(self, internal_id: str) -> str:
        """Where a request is that was sent here."""
        inside = self.core._requests.get(internal_id)
        if inside is None:
            return "leaving" if internal_id in self.tokens else "sent"
        if inside.slot >= 0:
            return "kept" if self.pauses.state == "paused" else inside.stage.value
        request = self.live.get(internal_id)
        if request is not None and request.is_retracted:
            return "retracted"
        if self.pauses.state != "running" and not (request and request.has_begun):
            return "held"
        return inside.stage.value

    # -- inputs --------------------------------------------------------------------------------

    def before_turn(self, inputs: list[Input], now: float, *, is_last: bool) -> None:
        """These inputs take effect now, in this order; in the last turn everything ends."""
        for internal_id, request in self.live.items():
            inside = self.core._requests.get(internal_id)
            if inside is not None:
                self._note_computed(request, inside.num_computed_tokens)
        self.pauses.begin_turn(now)
        for message in inputs:
            match message:
                case EngineCoreRequest():
                    self._add(message)
                case Abort():
                    for internal_id in message.request_ids:
                        named = self.live.get(internal_id)
                        if named is not None and not named.is_aborted:
                            del self.live[internal_id]
                case UtilityCall(_, call_id, method, args):
                    self._call(call_id, method, args, now)
                case JobDone():
                    self._owed.add(message.job.call_id)
                    self.weights.finish_stage(message)
                case _:
                    pass
        self.pauses.is_ending = is_last
        if is_last:
            for request in self.live.values():
                request.is_aborted = True

    def _call(self, call_id: int, method: str, args: tuple[Any, ...], now: float) -> None:
        if method not in (CAESURA_PAUSE, CAESURA_STAGE_WEIGHTS):
            self._owed.add(call_id)
        if method == CAESURA_STATUS:
            self._statuses[call_id] = (
                *(self.pauses.state, self.pauses.pause_id, self.pauses.mode),
                *(self.weights.label, len(self.weights.commits)),
            )
        elif method == CAESURA_ABORT:
            self.aborts.abort(call_id, args[0])
        elif method == CAESURA_PAUSE:
            self.pauses.pause(call_id, args, now)
        elif method == CAESURA_RESUME:
            self.pauses.resume(call_id)
        elif method == "reset_prefix_cache":
            self.pauses.flush(call_id, args)
        elif method == CAESURA_STAGE_WEIGHTS:
            self.weights.stage(call_id, args)
        elif method == CAESURA_COMMIT_WEIGHTS:
            running = [one.internal_id for one in self.pauses.running()]
            self.weights.commit(call_id, args, running)
        elif method == CAESURA_DISCARD_WEIGHTS:
            self.weights.discard(call_id, args)
        elif method == "set_weight_version":
            self.weights.set_label(args[0])

    def _note_computed(self, request: LedgerRequest, num_computed: int) -> None:
        """KV of so many tokens is there; what is new is of the present weights."""
        salts = request.cell_salts
        del salts[num_computed:]
        salts += [self.weights.salt] * (num_computed - len(salts))

    def _add(self, message: EngineCoreRequest) -> None:
        prompt, sampling = message.prompt_token_ids, message.sampling_params
        assert prompt is not None
        assert sampling is not None
        assert sampling.max_tokens is not None
        if message.request_id in self.tokens:
            self.violate("unique ids", f"{message.request_id} was sent twice")
        if self.pauses.state != "running":
            self.violate("held", f"{message.request_id} was sent to an engine that is paused")
        num_resumed = (sampling.extra_args or {}).get(NUM_RESUMED_TOKENS, 0)
        assert isinstance(num_resumed, int)
        eos = () if sampling.eos_token_id is None else (sampling.eos_token_id,)
        self.tokens[message.request_id] = []
        self.labels[message.request_id] = []
        self.live[message.request_id] = LedgerRequest(
            message.request_id,
            list(prompt),
            len(prompt) - num_resumed,
            num_resumed,
            sampling.max_tokens,
            sampling.min_tokens,
            frozenset((*sampling.stop_token_ids, *eos)),
            (message.priority, len(self.tokens)),
            message.cache_salt,
        )

    # -- outputs -------------------------------------------------------------------------------

    def on_output(self, outputs: EngineCoreOutputs) -> None:
        for row in outputs.outputs:
            if row.new_token_ids:
                self.weights.check_label(outputs.weight_version)
            self._take(row)
        for internal_id in outputs.finished_requests or ():
            self.check_gone(internal_id, "confirmed")
            self.confirmed.add(internal_id)
        if outputs.utility_output is not None:
            reply = outputs.utility_output
            self._owed.discard(reply.call_id)
            self.aborts.check_reply(reply)
            self.pauses.check_reply(reply)
            self.weights.check_reply(reply)
            if reply.call_id in self._statuses:
                self._check_status(reply)

    def _take(self, row: EngineCoreOutput) -> None:
        request = self.live.get(row.request_id)
        if request is None:
            self.violate("one end", f"{row.request_id} has an output after its end: {row[:2]}")
            return
        for token_id in row.new_token_ids:
            self._note_computed(request, len(request.context))
            wanted = next_token(request.context, request.cell_salts, self.weights.salt)
            if token_id != wanted:
                self.violate(
                    "tokens",
                    f"{request.internal_id} got {token_id}, not {wanted}, as token "
                    f"{request.num_output_tokens}",
                )
            request.context.append(token_id)
            self.tokens[request.internal_id].append(token_id)
            self.labels[request.internal_id].append(self.weights.label)
        expected = self._natural_end(request) if row.new_token_ids else None
        if request.is_aborted:
            if row.new_token_ids or row.finish_reason is not FinishReason.ABORT:
                self.violate("abort ends", f"{row.request_id} goes on after its abort: {row[:6]}")
            expected = FinishReason.ABORT
        if row.finish_reason is not expected:
            self.violate(
                "right end",
                f"{row.request_id} ended with {row.finish_reason}, not {expected}, behind "
                f"{request.num_output_tokens} tokens",
            )
        if row.finish_reason is not None:
            del self.live[row.request_id]

    def _natural_end(self, request: LedgerRequest) -> FinishReason | None:
        num_tokens = request.num_output_tokens
        if request.context[-1] in request.ending_token_ids and num_tokens >= request.min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if num_tokens == request.max_tokens else None

    def _check_status(self, reply: UtilityReply) -> None:
        expected, status = self._statuses.pop(reply.call_id), EngineStatus.from_wire(reply.result)
        told = (
            *(status.state, status.pause_id, status.pause_mode),
            *(status.weight_version, status.weight_epoch),
        )
        if told != expected:
            self.violate("status", f"engine {self.rank} says {told}, true is {expected}")

    def check_gone(self, internal_id: str, word: str) -> None:
        if self.holds(internal_id):
            self.violate("effect first", f"{internal_id} was {word} while the engine has it")

    def holds(self, internal_id: str) -> bool:
        """Whether anything of a request is in the engine."""
        scheduler = self.core.scheduler
        return (
            internal_id in self.core._requests
            or any(one.request_id == internal_id for one in scheduler.running)
            or any(one.request_id == internal_id for one in scheduler.waiting)
            or any(one.request_id == internal_id for one in scheduler.held)
        )

    # -- after all of it -----------------------------------------------------------------------

    def after_turn(self) -> None:
        """The core must know what it should, and its books must balance."""
        core, scheduler = self.core, self.core.scheduler
        if core._requests.keys() != self.live.keys():
            self.violate(
                "live requests",
                f"engine {self.rank} has {sorted(core._requests)}, not {sorted(self.live)}",
            )
        num_scheduled = len(scheduler.running) + scheduler.num_waiting
        if num_scheduled != len(self.live):
            self.violate("live requests", f"the scheduler has {num_scheduled} requests")
        if errors := scheduler.check_integrity():
            self.violate("integrity", "; ".join(errors))
        if self.pauses.is_ending and self.live:
            self.violate("one end", f"engine {self.rank} leaves {sorted(self.live)} without one")
        if self._owed:
            self.violate("control first", f"engine {self.rank} left {len(self._owed)} calls")
        self.pauses.after_turn()
        self.weights.after_turn()

    def check_idle(self) -> None:
        """Nothing is left."""
        self.weights.check_idle()
        pool = self.core.scheduler.pool
        if self.live or pool.num_available != pool.num_blocks:
            self.violate(
                "no leaks",
                f"engine {self.rank} is idle with {sorted(self.live)} live and "
                f"{pool.num_available} of {pool.num_blocks} blocks available",
            )
        if self.core.counters["integrity_violations"]:
            self.violate("integrity", f"engine {self.rank} counted violations")
