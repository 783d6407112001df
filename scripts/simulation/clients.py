"""Clients: they ask, read as they like, and hang up in every way."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from frontend.requests.intake import MAX_INLINE_CHARS
from frontend.requests.new_request import NewRequest
from frontend.requests.resume_from import plain_resume_from, read_resume_from
from frontend.sampling_params import SamplingParams
from scripts.simulation.accepting import Accepting
from scripts.simulation.actors import Target
from scripts.simulation.model_request import ModelRequest
from scripts.simulation.oracle import Wants
from scripts.simulation.readers import ReaderHabits, hang_up
from scripts.simulation.tokenizer import as_text

MAX_STATUS_S = 0.1
"""A step, and the network both ways: paused or busy, an engine takes no longer."""


class Clients(Accepting):
    """What clients do."""

    # -- requests ------------------------------------------------------------------------------

    def add(
        self,
        *,
        name: str | None,
        prompt: list[int],
        text: str | None,
        max_tokens: int,
        readers: list[dict[str, Any]],
        aliases: Iterable[str] = (),
        tags: Iterable[str] = (),
        priority: int = 0,
        tenant: str | None = None,
        timeout_s: float | None = None,
        final_only: bool = False,
        name_of: Target | None = None,
        **wanted: Any,
    ) -> None:
        """A call of as many requests as it has readers. `name_of`: it takes another's name."""
        if name_of is not None:
            for other in self.find([name_of]):
                self.count("duplicate id", [other])
                name = other.name
        lists = {key: tuple(value) for key, value in wanted.items() if isinstance(value, list)}
        wants = Wants(max_tokens=max_tokens, **(wanted | lists))
        as_chars = {None: None, "short": 0, "long": MAX_INLINE_CHARS + 1}[text]
        params = _params_of(wants)
        batch_id = name if len(readers) > 1 and name is not None else None
        words = None if as_chars is None else as_text(prompt, as_chars)
        children = [
            NewRequest(
                prompt=words,
                prompt_token_ids=prompt if words is None else None,
                sampling_params=params,
                request_id=name if batch_id is None else f"{name}.{index}",
                aliases=tuple(aliases),
                batch_id=batch_id,
                tags=tuple(tags),
                priority=priority,
                cache_salt=tenant,
                timeout_s=timeout_s,
                is_final_only=final_only,
            )
            for index in range(len(readers))
        ]
        self.accept(children, prompt, wants, [ReaderHabits(**habits) for habits in readers])

    def resume_from(
        self,
        *,
        pick: int,
        name: str,
        reader: dict[str, Any],
        max_tokens: int | None = None,
        timeout_s: float | None = None,
        as_json: bool = False,
    ) -> None:
        """Somebody continues an aborted request; one can be continued twice."""
        aborted = [one for one in self.model.requests if one.last and one.last.resume_from]
        if not aborted:
            return
        before = aborted[pick % len(aborted)]
        assert before.last is not None
        resume_from = before.last.resume_from
        assert resume_from is not None
        self.world.seen["resume_from", before.met_in] += 1
        if as_json:
            plain = json.loads(json.dumps(plain_resume_from(resume_from)))
            resume_from = read_resume_from(plain)
        wants = replace(before.wants, prompt_logprobs=None)
        params = _params_of(wants)
        if max_tokens is not None:
            params = replace(params, max_tokens=max_tokens, min_tokens=0)
            most = min(wants.max_tokens, len(before.chain) + max_tokens)
            wants = replace(wants, max_tokens=most, min_tokens=min(wants.min_tokens, most))
        new = NewRequest(
            resume_from=resume_from, sampling_params=params, request_id=name, timeout_s=timeout_s
        )
        self.accept([new], before.prompt, wants, [ReaderHabits(**reader)], before)

    # -- hanging up ----------------------------------------------------------------------------

    def close(self, *, targets: list[Target]) -> None:
        """Clients hang up, all in one turn of the loop."""
        requests = self.find(targets)
        self.count("close", requests)
        live = (one.entry.internal_id for one in requests if one.is_live)
        self.world.departures.note_drops(live)
        for request in requests:
            stream = request.stream()
            if stream is not None:
                hang_up(request, stream)

    def cancel(self, *, targets: list[Target]) -> None:
        """Reading tasks are cancelled."""
        requests = self.find(targets, lambda one: one.reader is not None)
        self.count("cancel", requests)
        for request in requests:
            if request.reader is not None and request.reader.cancel():
                request.reader.add_done_callback(_take_outcome)
                request.note_drop()

    def forget(self, *, targets: list[Target]) -> None:
        """The last reference to a stream that nobody reads goes."""
        requests = self.find(targets, lambda one: one.held_stream is not None)
        self.count("forget", requests)
        for request in requests:
            request.note_drop()
            request.held_stream = None

    def trickle(self, *, num_requests: int, every_s: float) -> None:
        """Clients of one call hang up one after the other."""
        num_before = len(self.model.requests)
        readers = [{"kind": "never"}] * num_requests
        self.add(name=None, prompt=[1, 2], text=None, max_tokens=30, readers=readers)
        self.start("trickle", self._trickle(self.model.requests[num_before:], every_s))

    async def _trickle(self, requests: list[ModelRequest], every_s: float) -> None:
        for request in requests:
            await asyncio.sleep(every_s)
            if (stream := request.stream()) is not None:
                hang_up(request, stream)

    # -- looking -------------------------------------------------------------------------------

    def list(self) -> None:
        self.count("list", self.model.requests)
        self.start("list", self._list())

    async def _list(self) -> None:
        before = self.model.live()
        told = {one.request_id for one in await self.world.frontend.list_requests()}
        if missing := [str(one) for one in before if one.is_live and one.name not in told]:
            self.world.violate("list", f"{missing} are live, and not listed")

    def status(self) -> None:
        self.start("status", self._status())

    async def _status(self) -> None:
        world, started_s = self.world, self.world.loop.time()
        statuses = await world.frontend.status()
        if not (world.had_faults or world.is_shutting_down):
            late_s = world.loop.time() - started_s
            if len(statuses) < len(world.fleet.engines) or late_s > MAX_STATUS_S:
                world.violate("control first", f"after {late_s} s {sorted(statuses)} have answered")
        for rank, status in statuses.items():
            if status.integrity_errors:
                self.world.violate("integrity", f"engine {rank}: {status.integrity_errors}")


def _params_of(wants: Wants) -> SamplingParams:
    return SamplingParams(
        max_tokens=wants.max_tokens,
        min_tokens=wants.min_tokens,
        stop=wants.stop,
        stop_token_ids=wants.stop_token_ids,
        ignore_eos=wants.ignore_eos,
        logprobs=wants.logprobs,
        prompt_logprobs=wants.prompt_logprobs,
        detokenize=wants.detokenize,
        include_stop_str_in_output=wants.include_stop,
    )


def _take_outcome(task: asyncio.Task[None]) -> None:
    """As who cancels a task awaits it: until then its frames, and so its stream, are kept alive."""
    with contextlib.suppress(asyncio.CancelledError):
        task.exception()
