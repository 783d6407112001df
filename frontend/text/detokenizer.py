"""Ids to text, piece by piece, while they arrive.

Invariants
- The pieces, joined, are `Tokenizer.decode` of all ids; half a character is never given out.
- Each token is looked at once, so a stream costs the same per token however long it gets.
- A stream continues its prompt: a leading space is dropped only where nothing visible stands before
  it.
"""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence

from frontend.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """The text of one stream of token ids."""

    __slots__ = ("_first_table", "_table", "_unfinished")

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        prompt_token_ids: Iterable[int] = (),
    ) -> None:
        """`prompt_token_ids` stand before the stream; they are not part of its text."""
        self._table = tokenizer.bytes_table(skip_special_tokens=skip_special_tokens)
        self._unfinished = b""
        """Bytes of a character whose rest is still to come; at most three."""
        self._first_table = tokenizer.first_bytes_table(skip_special_tokens=skip_special_tokens)
        """Set until something visible was seen."""
        if self._first_table is not None and any(map(self._table.__getitem__, prompt_token_ids)):
            self._first_table = None

    def add(self, token_ids: Sequence[int]) -> str:
        """Take the next tokens; returns the characters that are complete with them."""
        table = self._table
        if len(token_ids) == 1 and not self._unfinished and self._first_table is None:
            piece = table[token_ids[0]]
            if piece.isascii():  # Nearly every token, and several times cheaper.
                return piece.decode("ascii")
        if self._first_table is None:
            added = b"".join(map(table.__getitem__, token_ids))
        else:
            added = self._begin(token_ids)
        text, num_decoded = utf_8_decode(self._unfinished + added, "replace", False)
        self._unfinished = (self._unfinished + added)[num_decoded:]
        return text

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was cut off, or nothing."""
        text, self._unfinished = self._unfinished.decode("utf-8", "replace"), b""
        return text

    def _begin(self, token_ids: Sequence[int]) -> bytes:
        """Bytes of tokens at the beginning of a text, without the space that belongs to no word."""
        assert self._first_table is not None
        pieces = []
        for token_id in token_ids:
            piece = self._table[token_id]
            if piece and self._first_table is not None:
                piece = self._first_table[token_id]
                self._first_table = None
            pieces.append(piece)
        return b"".join(pieces)
