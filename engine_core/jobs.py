"""Work that a utility call asks for and that is too long for a boundary.

The core hands it out, its driver runs it on another thread while steps go on, and what came of it
returns to the core as one more input. The call is answered then.

Invariant: jobs run one after the other, in the order in which they were handed out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Job:
    """One call's work."""

    client_index: int
    call_id: int
    method: str
    run: Callable[[], object]
    """On another thread: changes nothing that a step reads."""
    finish: Callable[[object | Exception], object]
    """At a boundary, with what `run` returned or raised: the call's result; may raise."""

    def done(self) -> JobDone:
        """Run it, here and now."""
        try:
            return JobDone(self, self.run())
        except Exception as error:
            logger.debug("%s failed", self.method, exc_info=True)
            return JobDone(self, error.with_traceback(None))  # Its frames may hold weights.


@dataclass(frozen=True, slots=True)
class JobDone:
    """A job has run; the core is told at the next boundary."""

    job: Job
    outcome: object | Exception
