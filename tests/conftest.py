"""Set-up that must come before anything imports torch."""

from __future__ import annotations

import os

# On shared cores, OpenMP threads that spin while they wait cost a scheduler's time slice a call.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
