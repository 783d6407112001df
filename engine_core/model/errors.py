"""The one error of model loading."""

from __future__ import annotations


class ModelError(ValueError):
    """A model cannot be served as asked; the message names the value, and what to do instead."""
