"""What a result says of its tokens' weights and of its continuation.

Check `resume_from`: every result that was aborted, or lost with its engine, and whose prompt is
known carries it, and it says the truth: tokens, budgets, labels, and the text that may begin a stop
string.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from frontend.outputs import RequestOutput, ResumeFrom, WeightSpan
from scripts.simulation.oracle import Wants, text_of

if TYPE_CHECKING:
    from scripts.simulation.model_request import ModelRequest


def expand(spans: Iterable[WeightSpan]) -> list[str]:
    """One label a token; spans that leave gaps, overlap or could be one give nonsense."""
    labels: list[str] = []
    for span in spans:
        is_right = span.start == len(labels) < span.end and labels[-1:] != [span.version]
        labels += [span.version if is_right else "?"] * max(1, span.end - span.start)
    return labels


def can_go_on(output: RequestOutput) -> bool:
    """Whether a request that ended so may be continued."""
    is_lost = output.error is not None and output.error.retryable
    return output.finish_reason == "abort" or is_lost


def check_resume_from(
    request: ModelRequest,
    output: RequestOutput,
    num_left: int,
    violate: Callable[[str, str], object],
) -> None:
    """`num_left`: the tokens that fit behind the prompt."""
    told = output.resume_from
    if not can_go_on(output):
        if told is not None:
            violate("resume_from", f"{request} ended by itself with {told}")
        return
    if told is None:
        if request.entry.engine_index is not None or request.entry.origin is not None:
            violate("resume_from", f"{request} has none")
        return
    wants, chain = request.wants, request.chain
    expected = ResumeFrom(
        prompt_token_ids=tuple(request.prompt),
        output_token_ids=tuple(chain),
        num_output_tokens_left=min(wants.max_tokens, num_left) - len(chain),
        position=len(request.prompt) + len(chain),
        min_tokens_left=max(0, wants.min_tokens - len(chain)),
        stop_tail_text=_stop_tail(text_of(chain, wants, final=False), wants),
        weight_spans=told.weight_spans,
    )
    if told != expected:
        violate("resume_from", f"{request} has {told}, not {expected}")
    labels = [*request.earlier_labels, *request.labels]
    if expand(told.weight_spans) != labels:
        violate("resume_from", f"{request} has {told.weight_spans}, not {labels}")


def _stop_tail(text: str, wants: Wants) -> str:
    """The longest end that begins a stop string."""
    ends = [text[start:] for start in range(len(text))]
    return next(
        (end for end in ends if any(stop.startswith(end) and stop != end for stop in wants.stop)),
        "",
    )
