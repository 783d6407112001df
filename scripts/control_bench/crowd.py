"""A crowd of streams that never gets smaller: whoever ends is replaced a moment later."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from typing import Self

from scripts.control_bench.client import TokenStream, make_prompt

PROMPT_TOKENS = 128
MAX_TOKENS = 1000
REST_S = 0.02
"""Before a stream is replaced, so that what its end left behind can be seen."""


class Crowd:
    """Streams of a server, by their ids."""

    def __init__(self, port: int, size: int) -> None:
        self.live: dict[str, TokenStream] = {}
        """Sent and not ended."""
        self.ended: list[TokenStream] = []
        self._port = port
        self._size = size
        self._chance = random.Random(size)
        self._num_begun = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def gathered(cls, port: int, size: int) -> AsyncIterator[Self]:
        """A crowd all of whose streams run; they are dropped at the end of the block."""
        crowd = cls(port, size)
        tasks = [asyncio.create_task(crowd._keep_one()) for _ in range(size)]
        try:
            await crowd.all_running()
            yield crowd
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def running(self) -> list[TokenStream]:
        return [stream for stream in self.live.values() if stream.is_running]

    async def all_running(self) -> None:
        """Return when every stream that is to be there has tokens. Raises RuntimeError."""
        for _ in range(6000):
            if len(self.running()) == self._size:
                return
            await asyncio.sleep(0.01)
        raise RuntimeError(f"only {len(self.running())} of {self._size} streams run")

    async def _keep_one(self) -> None:
        while True:
            number = self._num_begun
            self._num_begun += 1
            # Of different lengths, so that they do not end together.
            num_tokens = self._chance.randint(MAX_TOKENS // 3, MAX_TOKENS)
            prompt = make_prompt(number, PROMPT_TOKENS)
            name = f"crowd-{number:05}"
            stream = await TokenStream.open(self._port, prompt, num_tokens, name)
            try:
                self.live[name] = stream
                stream.send()
                await stream.ended
                self.ended.append(self.live.pop(name))
                await asyncio.sleep(REST_S)
            finally:
                stream.close()
