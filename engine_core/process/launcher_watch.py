"""Makes an engine end with the process that launched it, however that one ends.

Two means, because neither covers all cases: the kernel kills us when the launching thread dies
(Linux only, and too late if it died before we asked), and the pipe on our stdin, whose other end
only the launcher holds, reaches its end when the launcher is gone or closes it to stop us.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1
_GRACE_S = 1.0
"""How long the engine may take to end its requests once its launcher is gone."""


class LauncherWatch:
    """Watches from its creation on; an engine that still starts is ended at once."""

    def __init__(self) -> None:
        self._request_shutdown: Callable[[], None] | None = None
        # Where there is no such call, as on other systems than Linux, stdin alone tells.
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        threading.Thread(target=self._run, name="launcher-watch", daemon=True).start()

    def shut_down_first(self, request_shutdown: Callable[[], None]) -> None:
        """From now on let the engine end its requests; it is ended when that takes too long.

        `request_shutdown` is called on the watching thread.
        """
        self._request_shutdown = request_shutdown

    def _run(self) -> None:
        # A stdin that cannot be read is as good as closed.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        if self._request_shutdown is not None:
            self._request_shutdown()
            time.sleep(_GRACE_S)
        os._exit(0)
