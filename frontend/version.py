"""Which version of Caesura runs."""

from __future__ import annotations

import importlib.metadata


def version() -> str:
    """The installed package's, or `0+unknown` in a checkout that is not installed."""
    try:
        return importlib.metadata.version("caesura")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
