"""Which weights sampled which output tokens.

An engine labels each frame with the weights of its step. A request keeps *marks*, one for each
label that it met: (number of tokens it had by then, label). Spans are made of them at its end only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from frontend.outputs import WeightSpan

Mark = tuple[int, str]
"""(index of the first token that it holds for, label), in the order of arrival."""


def spans_of(marks: Sequence[Mark], num_tokens: int) -> tuple[WeightSpan, ...]:
    """The spans over the first `num_tokens` tokens: in order, none of them empty, and never two of
    one label side by side. Tokens before the first mark are in none.
    """
    ends = [start for start, _ in marks[1:]]
    return _merged(
        WeightSpan(version, start, min(end, num_tokens))
        for (start, version), end in zip(marks, [*ends, num_tokens], strict=False)
    )


def joined(
    earlier: Iterable[WeightSpan], num_earlier: int, later: Iterable[WeightSpan]
) -> tuple[WeightSpan, ...]:
    """The spans of `num_earlier` tokens and of the tokens behind them, as one."""
    shifted = (
        WeightSpan(span.version, span.start + num_earlier, span.end + num_earlier) for span in later
    )
    return _merged((*earlier, *shifted))


def _merged(spans: Iterable[WeightSpan]) -> tuple[WeightSpan, ...]:
    merged: list[WeightSpan] = []
    for span in spans:
        if span.start >= span.end:
            continue
        if merged and merged[-1].version == span.version and merged[-1].end == span.start:
            span = WeightSpan(span.version, merged.pop().start, span.end)
        merged.append(span)
    return tuple(merged)
