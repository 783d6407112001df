"""Explicit aborts, by every selector, and what their receipts must say."""

from __future__ import annotations

from collections.abc import Iterable

from frontend.outputs import AbortCause, AbortReceipt
from scripts.simulation.actors import Actor, Target
from scripts.simulation.model_request import ModelRequest

NOBODY = "nobody"
"""An id that no request ever has."""


class Aborting(Actor):
    """What somebody with the right to end requests does."""

    def abort(
        self,
        *,
        wait: bool,
        timeout_s: float,
        targets: list[Target] | None = None,
        by: str = "id",
        unknown: Iterable[str] = (),
        prefix: str | None = None,
        tag: str | None = None,
        everything: bool = False,
    ) -> None:
        """An explicit abort by one selector."""
        live = self.model.live()
        names: list[str] | None = None
        unknown = [name for name in unknown if all(name not in one.names for one in live)]
        if targets is not None:
            requests = self.find(targets, lambda one: by == "id" or one.batch_id is not None)
            self.count("abort batch" if by == "batch" else "abort id", requests)
            names = [
                one.names[-1] if by == "batch" else one.names[one.number % len(one.names)]
                for one in requests
            ]
            names += unknown or ([] if names else [NOBODY])
            if len(names) > len(requests):
                self.world.seen["abort id", "unknown"] += 1
        else:
            how = "abort prefix" if prefix else "abort tag" if tag else "abort all"
            assert prefix or tag or everything
            self.count(how, self._select(names, prefix, tag))
        self.start("abort", self._abort(names, prefix, tag, wait, timeout_s))

    def _select(
        self, names: list[str] | None, prefix: str | None, tag: str | None
    ) -> list[ModelRequest]:
        """The live requests that a selector means."""
        live = self.model.live()
        if names is not None:
            return [one for one in live if any(name in names for name in one.names)]
        if prefix is not None:
            return [one for one in live if any(name.startswith(prefix) for name in one.names)]
        if tag is not None:
            return [one for one in live if tag in one.tags]
        return live

    async def _abort(
        self,
        names: list[str] | None,
        prefix: str | None,
        tag: str | None,
        wait: bool,
        timeout_s: float,
    ) -> None:
        world = self.world
        requests = self._select(names, prefix, tag)
        for request in requests:
            request.allowed_causes.add(AbortCause.EXPLICIT)
        calls = world.departures.num_abort_calls
        num_calls = {one.number: calls[one.entry.internal_id] for one in requests}
        is_all = names is None and prefix is None and tag is None
        receipt = await world.frontend.abort(
            names, prefix=prefix, tag=tag, abort_all=is_all, wait=wait, timeout_s=timeout_s
        )
        world.trace.note(world.loop.time(), "receipt", sorted(receipt.requests.items()))
        for request in requests:
            was_sent = calls[request.entry.internal_id] > num_calls[request.number]
            if request.is_live and not was_sent and not self._is_dead(request):
                world.violate("exact aim", f"the abort of {request} went nowhere")
        expected = {one.name for one in requests}
        if names is not None:
            called = {name for one in requests for name in one.names}
            expected |= {name for name in names if name not in called}
        if receipt.requests.keys() != expected:
            world.violate("receipt", f"it names {sorted(receipt.requests)}, not {sorted(expected)}")
        for request in requests:
            self._check_receipt(request, receipt, wait=wait)

    def _is_dead(self, request: ModelRequest) -> bool:
        return request.entry.engine_index in self.world.fleet.dead

    def _check_receipt(self, request: ModelRequest, receipt: AbortReceipt, *, wait: bool) -> None:
        world, entry = self.world, request.entry
        told = receipt.requests.get(request.name)
        if told is None:
            return
        rank = entry.engine_index
        if told.status in ("aborted", "finished"):
            reason = entry.terminal.finish_reason if entry.terminal is not None else None
            if (reason == "abort") != (told.status == "aborted") or reason is None:
                world.violate("receipt", f"{request} is {told}, but ended with {entry.terminal}")
            if told.num_output_tokens != entry.num_output_tokens:
                world.violate("receipt", f"{request} has other tokens than {told}")
            if rank is not None and receipt.engines.get(rank) == "ok":
                if world.fleet.ledgers[rank].holds(entry.internal_id):
                    world.violate("effect first", f"{request} is {told}; its engine has it")
                sampled = len(world.fleet.sampled(entry))
                is_whole = entry.terminal is not None and (
                    entry.terminal.abort_cause is AbortCause.EXPLICIT
                )  # Else the front end ended it meanwhile, with what it had.
                if is_whole and told.num_output_tokens != sampled:
                    world.violate("receipt", f"{request} is {told}, and sampled {sampled} tokens")
        elif wait and rank is not None and receipt.engines.get(rank) == "ok":
            world.violate("receipt", f"{request} is {told}, although its engine answered")
