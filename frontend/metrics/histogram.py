"""Histograms: how many values fell into each bucket, and their sum.

Latencies have six buckets a decade, each bound at most 1.67 times the one before; counts of things
have powers of two.
"""

from __future__ import annotations

from bisect import bisect_left

_MANTISSAS = ("1", "1.5", "2", "3", "5", "7.5")


def seconds_buckets(first_exponent: int, last_s: float) -> tuple[float, ...]:
    """Upper bounds of 1, 1.5, 2, 3, 5 and 7.5 times the powers of ten, from 10**first_exponent up
    to `last_s` seconds."""
    bounds: list[float] = []
    exponent = first_exponent
    while True:
        for mantissa in _MANTISSAS:
            bound = float(f"{mantissa}e{exponent}")  # Parsed, so that each is the nearest float.
            if bound > last_s:
                return tuple(bounds)
            bounds.append(bound)
        exponent += 1


def doubling_buckets(last: int) -> tuple[float, ...]:
    """Upper bounds of 1, 2, 4, ... up to `last`."""
    return tuple(float(1 << power) for power in range(last.bit_length()))


class Histogram:
    """Counts of values by bucket. A bucket holds what is at most its bound, and more than the one
    before; the last one, beyond all bounds, has none.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0
        """Sum of all values."""

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value
