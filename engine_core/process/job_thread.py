"""Runs the core's jobs, one after the other, on a thread of its own.

What came of a job enters the intake like everything else that reaches the step loop. The thread
begins with the first job: most engines never have one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from queue import SimpleQueue

from engine_core.jobs import Job
from engine_core.process.intake import Intake, Received

_NICENESS = 10


class JobThread:
    """A daemon: a job that hangs, as one that awaits a dead trainer, holds up no shutdown."""

    def __init__(self, intake: Intake) -> None:
        self._intake = intake
        self._jobs: SimpleQueue[Job] = SimpleQueue()
        self._thread: threading.Thread | None = None
        # Those of the process; the step loop's thread may be kept to one of them later.
        self._cores = os.sched_getaffinity(0)

    def start(self, job: Job) -> None:
        """Run a job behind those that were started before."""
        self._jobs.put(job)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="jobs", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        # Steps go first: without this, loading half a gigabyte doubled their time.
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICENESS)
        os.sched_setaffinity(0, self._cores)
        while True:
            job = self._jobs.get()
            self._intake.put(Received(job.client_index, job.done()))
            del job  # It may hold weights, and the next one may never come.
