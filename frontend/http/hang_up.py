"""Ends the work for a client at the moment it hangs up.

The watch runs beside the work and interrupts it wherever it waits: for a token, or for a slow
connection. Nothing is polled, so a request that has produced no token yet ends as promptly as one
that streams.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Receive


class EndOnHangUp:
    """A block that is left early, without an exception, when the client hangs up.

    Enter it after the request's body was read: the watch takes over `receive`.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.hung_up = False
        """Whether that is what ended the block."""

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watch = asyncio.create_task(self._interrupt_on_hang_up())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._watch.cancel()
        if not self.hung_up:
            return False
        # Somebody else may have cancelled the task as well; then the cancellation goes on.
        return self._task.uncancel() == 0 and kind is asyncio.CancelledError

    async def _interrupt_on_hang_up(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.hung_up = True
        self._task.cancel()
