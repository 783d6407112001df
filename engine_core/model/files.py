"""Opening files that somebody else names.

A pipe or a device under a model's path must not stop an engine or fill its memory, so only regular
files are opened. Steps stand still while JSON is parsed, so it has a bounded size.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import BinaryIO

from engine_core.model.errors import ModelError

MAX_JSON_BYTES = 2**22
"""Room for 30,000 tensors, thirty times as many as the largest models that are served have; parsing
so much takes at most a third of a second.
"""


def open_regular(path: Path) -> BinaryIO:
    """A file for reading. Raises OSError, or ModelError if it is no file but something else."""
    # Opening a pipe to read would wait for its writer; without blocking it is opened, and seen.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ModelError(f"{path} is no regular file")
    return os.fdopen(descriptor, "rb")


def read_json(path: Path) -> object:
    """What a JSON file holds. Raises OSError, ModelError or ValueError."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > MAX_JSON_BYTES:
            raise ModelError(f"{path} has {size} bytes, more than any configuration")
        return json.loads(file.read())
