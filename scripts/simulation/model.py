"""The clients' side of the contract: what each request may receive, and how it may end.

A small model that is independent of the front end: it knows what clients did and what they got, and
looks at the front end's entries only to learn when a request ended.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace

from frontend.outputs import AbortCause, RequestOutput, Terminal
from frontend.requests.registry import Entry
from scripts.simulation.engine_pauses import Violate
from scripts.simulation.fleet import Fleet
from scripts.simulation.model_request import ModelRequest
from scripts.simulation.oracle import End, natural_end, text_of
from scripts.simulation.spans import can_go_on, check_resume_from, expand

DROP_SLACK_S = 0.11
"""A dropped request ends in the next turn of the loop, which may stand still for so long."""
EXPIRY_SLACK_S = 5.5
"""A deadline holds within so long, also where an engine does not answer."""


class Model:
    """All requests of one life of the front end."""

    def __init__(self, max_model_len: int, fleet: Fleet, violate: Violate) -> None:
        self.requests: list[ModelRequest] = []
        self.num_arrived = Counter[str]()
        """Tokens by internal id, as they came out of an engine's frames."""
        self.by_entry: dict[Entry, ModelRequest] = {}
        self.may_refuse: Callable[[ModelRequest], bool] = lambda request: False
        """Whether a pause may end it with an error."""
        self._max_model_len = max_model_len
        self._fleet = fleet
        self._violate = violate

    # -- names ---------------------------------------------------------------------------------

    def live(self) -> list[ModelRequest]:
        return [request for request in self.requests if request.is_live]

    def is_taken(self, new: Iterable[tuple[str, tuple[str, ...]]], batch_id: str | None) -> bool:
        """Whether requests of these (name, aliases) may not be accepted now."""
        live = self.live()
        own: set[str] = {
            name
            for one in live
            for name in ((one.name,) if one.batch_id else (one.name, *one.aliases))
        }
        shared: dict[str, str | None] = {
            name: one.batch_id
            for one in live
            if one.batch_id is not None
            for name in (one.batch_id, *one.aliases)
        }
        for name, aliases in new:
            mine = (name,) if batch_id else (name, *aliases)
            mine = tuple(dict.fromkeys(mine))
            if any(one in own or one in shared for one in mine):
                return True
            ours = (batch_id, *aliases) if batch_id else ()
            if any(one in own or shared.get(one, batch_id) != batch_id for one in ours):
                return True
            own.update(mine)
            shared.update(dict.fromkeys(ours, batch_id))
        return False

    # -- what readers get ----------------------------------------------------------------------

    def on_output(self, request: ModelRequest, output: RequestOutput) -> None:
        """A reader took an event."""
        if request.last is not None:
            self._violate("one end", f"{request} got {output} after its end")
        sampled, start = self._fleet.sampled(request.entry), len(request.token_ids)
        request.token_ids += output.token_ids
        if list(output.token_ids) != sampled[start : len(request.token_ids)]:
            self._violate(
                "tokens", f"{request} got {output.token_ids} behind {start} tokens of {sampled}"
            )
        request.text.append(output.text)
        if output.num_prompt_tokens not in (0, len(request.prompt)):
            self._violate("count", f"{request} has {output.num_prompt_tokens} prompt tokens")
        self._check_logprobs(request, output)
        if output.prompt_logprobs:
            request.has_prompt_logprobs = True
            if [one.token_id for one in output.prompt_logprobs] != request.prompt[1:]:
                self._violate("logprobs", f"{request} got prompt logprobs of other tokens")
        if output.finish_reason is not None:
            request.last = output
            self._check_last(request, output)

    def on_delta(self, request: ModelRequest, text: str, token_ids: list[int]) -> None:
        """A listening reader took a plain delta."""
        self.on_output(request, RequestOutput(request.name, text, tuple(token_ids)))

    def _check_logprobs(self, request: ModelRequest, output: RequestOutput) -> None:
        wanted = request.wants.logprobs
        if [one.token_id for one in output.logprobs] != (
            [] if wanted is None else list(output.token_ids)
        ):
            self._violate("logprobs", f"{request} got logprobs that are not its tokens'")
        if any(len(one.top) != wanted for one in output.logprobs):
            self._violate("logprobs", f"{request} got another number of alternatives")

    def _check_last(self, request: ModelRequest, output: RequestOutput) -> None:
        terminal = request.entry.terminal
        if terminal is None:
            self._violate("one end", f"{request} was told its end before it ended")
            return
        told = (output.finish_reason, output.stop_reason, output.abort_cause, output.error)
        if told != (
            terminal.finish_reason,
            terminal.stop_reason,
            terminal.abort_cause,
            terminal.error,
        ):
            self._violate("one end", f"{request} was told {told}, but ended with {terminal}")
        num_left = self._max_model_len - len(request.prompt)
        chain, text = request.chain, request.chain_text
        natural = natural_end(chain, request.wants, num_left)
        if output.finish_reason in ("stop", "length"):
            if natural is not None and len(natural.text) < len(request.earlier_text):
                # A stop string began in what was given out before.
                natural = replace(natural, text=request.earlier_text)
            got = End(len(chain), output.finish_reason, output.stop_reason, text)
            if got != natural:
                self._violate("right end", f"{request} got {got}, not {natural}")
        else:
            if natural is not None:
                self._violate("right end", f"{request} has all its tokens but {told}")
            # Half a character is left to whatever continues it.
            expected = text_of(chain, request.wants, final=not can_go_on(output))
            if output.abort_cause is AbortCause.DROPPED_STREAM:
                return  # It closed the stream itself: nobody listens.
            if text != expected:
                self._violate("text", f"{request} got {text!r}, not {expected!r}")
        if request.entry.num_output_tokens != len(request.token_ids):
            self._violate("count", f"{request}: {request.entry.num_output_tokens} tokens counted")
        if request.token_ids and request.has_prompt_logprobs != (
            request.wants.prompt_logprobs is not None and len(request.prompt) > 1
        ):
            self._violate("logprobs", f"{request}: prompt logprobs where they do not belong")
        self._check_spans(request, output)
        check_resume_from(request, output, num_left, self._violate)

    def _check_spans(self, request: ModelRequest, output: RequestOutput) -> None:
        """Each token's label is the one that its step ran under."""
        labels = self._fleet.labels(request.entry)[: len(request.token_ids)]
        if expand(output.weight_spans) != labels:
            self._violate("spans", f"{request} was told {output.weight_spans}, not {labels}")
        request.labels = labels

    # -- ends ----------------------------------------------------------------------------------

    def add(self, request: ModelRequest) -> None:
        self.requests.append(request)
        self.by_entry[request.entry] = request

    def on_end(self, entry: Entry, now: float) -> None:
        """The front end says that a request has ended."""
        request = self.by_entry.get(entry)
        if request is None:
            return  # Refused within its acceptance, or ended before its model was made.
        if request.ended_s is not None:
            self._violate("one end", f"{request} ended twice")
        request.ended_s = now
        terminal = entry.terminal
        request.met_in = request.met_in or self._fleet.stage(entry)
        assert terminal is not None
        self._check_cause(request, terminal, now)
        is_whole = terminal.stop_reason is None and (
            terminal.abort_cause is not AbortCause.DROPPED_STREAM
        )
        num_arrived = self.num_arrived[entry.internal_id]
        if is_whole and entry.num_output_tokens != num_arrived:
            self._violate("tokens", f"{request} ended without all of {num_arrived} that arrived")

    def _check_cause(self, request: ModelRequest, terminal: Terminal, now: float) -> None:
        rank = request.entry.engine_index
        match terminal.finish_reason:
            case "stop" | "length":
                return
            case "abort":
                cause = terminal.abort_cause
                if cause is AbortCause.DEADLINE:
                    is_right = (
                        request.timeout_s is not None
                        and now >= request.accepted_s + request.timeout_s - 1e-9
                    )
                elif cause is AbortCause.ENGINE:
                    is_right = rank in self._fleet.dead
                else:
                    is_right = cause in request.allowed_causes
            case "error":
                code = terminal.error.code if terminal.error is not None else None
                is_right = {
                    "engine_dead": rank in self._fleet.dead or rank is None,
                    "engine_protocol_error": rank in self._fleet.corrupted,
                    "context_length_exceeded": len(request.prompt) >= self._max_model_len,
                    "overloaded": rank is None,
                    "engine_paused": rank is None and self.may_refuse(request),
                }.get(code or "", False)
                if not is_right and rank is None and code == "internal_error":
                    # No engine was left when its prompt was tokenized.
                    is_right = bool(self._fleet.dead)
            case _:
                is_right = False
        if not is_right:
            self._violate("exact aim", f"{request} ended with {terminal}")

    def check_ends(self) -> None:
        """Everything has had its time: each request must have ended, and each reader been told."""
        for request in self.requests:
            if request.ended_s is None:
                self._violate("liveness", f"{request} has not ended")
                continue
            dropped_s = request.dropped_s
            if dropped_s is not None and request.ended_s > dropped_s + DROP_SLACK_S:
                self._violate("drop", f"{request} ran on for {request.ended_s - dropped_s} s")
            if request.is_read and not request.is_dropped and request.last is None:
                self._violate("one end", f"{request} ended, and its reader was not told")
            due_s = request.accepted_s + (request.timeout_s or 0.0)
            if request.timeout_s is not None and request.ended_s > due_s + EXPIRY_SLACK_S:
                self._violate("deadline", f"{request} outlived its deadline")
