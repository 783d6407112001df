"""From sampled ids to the text a client reads: detokenizing and stop strings of one stream.

Invariants
- Text given out is final. The pieces, joined, are the decoded tokens, cut at the stop string.
- A stop string ends the stream with the token that completes it: that token counts, later ones of
  the same delta do not.
- A stream that continues another gives out new text only: what the other gave out is not repeated,
  but may be the beginning of a character or a stop string that ends here.
- A token that itself ended the request (EOS or a stop token) counts but has no text, unless
  `include_stop_str_in_output` asks for it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from frontend.sampling_params import SamplingParams
from frontend.text.detokenizer import IncrementalDetokenizer
from frontend.text.stop_strings import StopMatch, StopStrings
from frontend.text.tokenizer import Tokenizer


class ProcessedDelta(NamedTuple):
    """What a delta of token ids comes to."""

    text: str
    """Text to give out now."""
    num_tokens_used: int
    """Leading tokens of the delta that belong to the result; fewer than it holds only after a stop
    string."""
    stop_reason: str | None = None
    """The stop string that ended the stream, if one did."""


class OutputProcessor:
    """The text of one stream."""

    __slots__ = (
        "_detokenizer",
        "_ending_token_ids",
        "_min_tokens",
        "_num_given_out",
        "_num_tokens",
        "_stops",
    )

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        sampling_params: SamplingParams,
        prompt_token_ids: Iterable[int] = (),
        *,
        earlier_token_ids: Sequence[int] = (),
        stop_tail_text: str = "",
    ) -> None:
        """Without a tokenizer, or with `detokenize=False`, tokens pass and have no text.

        The stream continues one that had `earlier_token_ids` and left `stop_tail_text`.
        `sampling_params` are about its own tokens.
        """
        self._detokenizer: IncrementalDetokenizer | None = None
        self._stops: StopStrings | None = None
        self._ending_token_ids: frozenset[int] = frozenset()
        self._min_tokens = sampling_params.min_tokens
        self._num_tokens = 0
        self._num_given_out = 0
        """Characters to come that the earlier stream gave out already."""
        if tokenizer is None or not sampling_params.detokenize:
            return
        self._detokenizer = IncrementalDetokenizer(
            tokenizer,
            skip_special_tokens=sampling_params.skip_special_tokens,
            prompt_token_ids=prompt_token_ids,
        )
        self._detokenizer.add(earlier_token_ids)
        if sampling_params.stop:
            self._stops = StopStrings(
                sampling_params.stop,
                include_in_output=sampling_params.include_stop_str_in_output,
            )
            self._stops.add(stop_tail_text, match=False)
            self._num_given_out = len(self._stops.held_back)
        if not sampling_params.include_stop_str_in_output:
            self._ending_token_ids = sampling_params.ending_token_ids(tokenizer.eos_token_ids)

    def process(self, token_ids: Sequence[int], finished: bool) -> ProcessedDelta:
        """Take the next tokens of the stream; `finished` says that no more will come.

        Nothing may follow a delta with a stop_reason, and only empty ones a finished delta.
        """
        detokenizer, stops = self._detokenizer, self._stops
        if detokenizer is None:
            return ProcessedDelta("", len(token_ids))
        num_tokens = len(token_ids)
        if finished and num_tokens and token_ids[-1] in self._ending_token_ids:
            token_ids = token_ids[:-1]
        if stops is None:
            text = detokenizer.add(token_ids)
            return ProcessedDelta(text + detokenizer.finish() if finished else text, num_tokens)

        # Token by token, so that the one which completes a stop string is known.
        pieces: list[str] = []
        # Stop strings that one of so many tokens of this delta completes do not count.
        num_exempt = self._min_tokens - self._num_tokens
        self._num_tokens += num_tokens
        for num_used, token_id in enumerate(token_ids, start=1):
            found = stops.add(detokenizer.add((token_id,)), match=num_used > num_exempt)
            if isinstance(found, StopMatch):
                return ProcessedDelta(self._new((*pieces, found.text)), num_used, found.stop)
            pieces.append(found)
        if finished:
            found = stops.add(detokenizer.finish(), match=num_tokens > num_exempt)
            if isinstance(found, StopMatch):
                return ProcessedDelta(self._new((*pieces, found.text)), num_tokens, found.stop)
            pieces += found, stops.finish()
        return ProcessedDelta(self._new(pieces), num_tokens)

    @property
    def stop_tail_text(self) -> str:
        """The end of the text so far that may be the beginning of a stop string."""
        return "" if self._stops is None else self._stops.held_back

    def break_off(self) -> str:
        """The text held back for a stop string, now that the stream ends before its time.

        Half a character is left to whatever continues the stream.
        """
        return "" if self._stops is None else self._new((self._stops.finish(),))

    def _new(self, pieces: Iterable[str]) -> str:
        """The pieces as one, without what the earlier stream gave out."""
        text = "".join(pieces)
        if self._num_given_out:
            num_old = min(self._num_given_out, len(text))
            self._num_given_out -= num_old
            return text[num_old:]
        return text
