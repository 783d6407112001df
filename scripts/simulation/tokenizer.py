"""A tokenizer of 64 tokens, for requests that come as text: letters are tokens, spaces are none.

The last four tokens are halves of a two-byte character, so that a stream meets unfinished ones.
"""

from __future__ import annotations

import string

from frontend.errors import PromptTooLongError

VOCAB_SIZE = 64
EOS_TOKEN_ID = 7
_LETTERS = string.ascii_letters + "01234567"
_BYTES = [letter.encode() for letter in _LETTERS] + [b"\xc3", b"\xa9", b"\xc3", b"\xa8"]
_IDS = {letter: token_id for token_id, letter in enumerate(_LETTERS)}


def token_bytes(token_id: int) -> bytes:
    return _BYTES[token_id]


def as_text(token_ids: list[int], num_chars: int) -> str:
    """A text of at least `num_chars` characters that is tokenized to `token_ids`."""
    letters = "".join(_LETTERS[token_id] for token_id in token_ids)
    return letters + " " * max(0, num_chars - len(letters))


class FakeTokenizer:
    """As much of `frontend.text.tokenizer.Tokenizer` as a front end uses of it."""

    eos_token_ids = (EOS_TOKEN_ID,)

    def check_fits(self, text: str, max_model_len: int) -> None:
        """Raises PromptTooLongError for what is surely too long."""
        if len(text) > 20_000:
            raise PromptTooLongError(f"the prompt has {len(text)} characters; shorten it")

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [_IDS[letter] for letter in text.replace(" ", "")]

    def bytes_table(self, *, skip_special_tokens: bool) -> list[bytes]:
        return _BYTES

    def first_bytes_table(self, *, skip_special_tokens: bool) -> list[bytes] | None:
        return None
