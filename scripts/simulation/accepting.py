"""How calls are accepted or refused, and what becomes of them then.

Checks
- `names`: a name that is taken is refused, and no other.
- `acceptance`: a call is refused only for a reason, and leaves nothing behind.
- `refused`: while a pause rejects newcomers, or holds as many as it may, all are refused (503).
"""

from __future__ import annotations

import weakref
from typing import Any

from frontend.errors import (
    DuplicateRequestIdError,
    EngineDeadError,
    EnginePausedError,
    InvalidRequestError,
    OverloadedError,
    PromptTooLongError,
)
from frontend.requests import pause_gate
from frontend.requests.new_request import NewRequest
from frontend.requests.stream import RequestStream
from scripts.simulation.actors import Actor
from scripts.simulation.model_request import ModelRequest
from scripts.simulation.oracle import Wants
from scripts.simulation.readers import ReaderHabits, listen, read


class Accepting(Actor):
    """Makes calls, and begins to read what was accepted."""

    def accept(
        self,
        children: list[NewRequest],
        prompt: list[int],
        wants: Wants,
        readers: list[ReaderHabits],
        continued: ModelRequest | None = None,
    ) -> None:
        world, model = self.world, self.model
        registry = world.dispatcher.registry
        named = [
            (one.request_id or f"new {index}", tuple(one.aliases))
            for index, one in enumerate(children)
        ]
        is_taken = model.is_taken(named, children[0].batch_id)
        known = set(registry)
        order = world.watch.order
        is_refused = order is not None and (
            order.newcomers == "reject"
            or world.frontend.pause_state.num_held + len(children) > pause_gate.MAX_NUM_HELD
        )
        try:
            streams = world.frontend.accept(children)
        except DuplicateRequestIdError as error:
            if not is_taken:
                world.violate("names", f"{named} was refused: {error}")
            return self._check_refused(known)
        except EnginePausedError as error:
            if not is_refused:
                world.violate("refused", f"{named} was refused: {error}")
            return self._check_refused(known)
        except (EngineDeadError, OverloadedError, PromptTooLongError) as error:
            is_right = {
                EngineDeadError: bool(world.fleet.dead),
                OverloadedError: True,
                PromptTooLongError: len(prompt) >= world.max_model_len,
            }[type(error)]
            if not is_right:
                world.violate("acceptance", f"{named} was refused: {error}")
            return self._check_refused(known)
        except InvalidRequestError as error:
            if not self._is_too_much(children):
                world.violate("acceptance", f"{named} was refused: {error}")
            return self._check_refused(known)
        if is_taken:
            world.violate("names", f"{named} was accepted, and is taken")
        if is_refused:
            world.violate("refused", f"{named} was accepted while newcomers are rejected")
        for new, stream, habits in zip(children, streams, readers, strict=True):
            self._begin(new, stream, prompt, wants, habits, continued)
        return None

    def _is_too_much(self, children: list[NewRequest]) -> bool:
        """Whether a call can never be admitted as a whole."""
        limit = self.world.scenario.max_num_queued_requests
        return limit is not None and len(children) > limit

    def _check_refused(self, known: set[Any]) -> None:
        if not set(self.world.dispatcher.registry) <= known:
            self.world.violate("acceptance", "a refused call left requests behind")

    def _begin(
        self,
        new: NewRequest,
        stream: RequestStream,
        prompt: list[int],
        wants: Wants,
        habits: ReaderHabits,
        continued: ModelRequest | None,
    ) -> None:
        """A request was accepted; its client begins to read."""
        world, model = self.world, self.model
        entry = world.entry_of(stream)
        request = ModelRequest(
            number=len(model.requests),
            name=stream.request_id,
            aliases=tuple(new.aliases),
            batch_id=new.batch_id,
            tags=frozenset(new.tags),
            prompt=prompt,
            wants=wants,
            timeout_s=new.timeout_s,
            accepted_s=world.loop.time(),
            entry=entry,
            stream=weakref.ref(stream),
            is_read=habits.kind != "never",
        )
        if entry.engine_index is None and entry.add_frames:
            request.held_s = world.loop.time()
        if continued is not None:
            request.earlier, request.earlier_text = continued.chain, continued.chain_text
            request.earlier_labels = [*continued.earlier_labels, *continued.labels]
        model.add(request)
        if entry.terminal is not None:
            # An engine that died while its sibling was sent took it along.
            model.on_end(entry, world.loop.time())
        if habits.kind == "never":
            request.held_stream = stream
        elif habits.kind == "listen":
            listen(model, request, stream, habits)
        else:
            self.start(f"reader of #{request.number}", read(model, request, stream, habits))
            request.reader = world.tasks[-1]
