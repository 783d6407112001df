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


def end_with_launcher(request_shutdown: Callable[[], None]) -> None:
    """Watch the launcher from now on; when it is gone call `request_shutdown`, and leave at the
    latest a second later.

    `request_shutdown` runs on the watching thread.
    """
    _ask_kernel_to_kill_us()
    threading.Thread(
        target=_wait_for_end_of_stdin, args=(request_shutdown,), name="launcher-watch", daemon=True
    ).start()


def _ask_kernel_to_kill_us() -> None:
    # Where there is no such call, as on other systems than Linux, stdin alone tells.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _wait_for_end_of_stdin(request_shutdown: Callable[[], None]) -> None:
    try:
        while os.read(0, 4096):
            pass
    except OSError:
        pass  # A stdin that cannot be read is as good as closed.
    request_shutdown()
    time.sleep(_GRACE_S)
    os._exit(0)
