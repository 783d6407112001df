"""Which bytes each token stands for, read off a tokenizer's decoder.

Text is decoded as bytes first and as UTF-8 second: a token has one byte string, whatever stands
around it, and the text of many tokens is the UTF-8 of their bytes, joined. So a stream holds back
nothing but an unfinished character, a token costs one look-up, and the OpenAI `bytes` of a logprob
are the same bytes.

Invariants
- A token's bytes do not depend on its neighbours. The one exception is the first token of a text,
  from which SentencePiece tokenizers drop the space that they put before every text.
- Ids without a token (padding of the embedding matrix) and skipped special tokens stand for no
  bytes.
- Bytes that are no UTF-8 become U+FFFD one by one. (The `tokenizers` library gives up a whole run
  of byte-fallback tokens for one bad byte; a stream cannot do that, for it would have to hold back
  the run.)
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

ToBytes = Callable[[str], bytes]


class TokenizerError(ValueError):
    """A model's tokenizer is missing, damaged or of a kind that Caesura does not serve."""


class TokenBytes(dict[int, bytes]):
    """Token id -> its bytes, worked out at the first use of each id."""

    __slots__ = ("_id_to_token", "_skipped_ids", "_to_bytes")

    def __init__(
        self,
        to_bytes: ToBytes,
        id_to_token: Callable[[int], str | None],
        skipped_ids: Container[int] = (),
    ) -> None:
        self._to_bytes = to_bytes
        self._id_to_token = id_to_token
        self._skipped_ids = skipped_ids

    def __missing__(self, token_id: int) -> bytes:
        token = None if token_id in self._skipped_ids else self._id_to_token(token_id)
        self[token_id] = token_bytes = b"" if token is None else self._to_bytes(token)
        return token_bytes


def compile_decoder(spec: dict[str, Any] | None) -> tuple[ToBytes, ToBytes | None]:
    """Turn the `decoder` of a tokenizer.json into token -> bytes.

    Returns the function for any token, and the one for the first token of a text where that
    differs. Serves byte-level BPE and SentencePiece-like decoders (Replace, ByteFallback, Fuse,
    Strip, Metaspace); TokenizerError for others.
    """
    if spec is None:
        raise TokenizerError("tokenizer.json has no decoder, so its tokens cannot become text")
    steps = spec["decoders"] if spec["type"] == "Sequence" else [spec]
    replacements: list[tuple[str, str]] = []
    has_byte_fallback = is_byte_level = drops_all_leading = False
    num_stripped = 0
    for step in steps:
        match step:
            case {"type": "ByteLevel"}:
                is_byte_level = True
            case {"type": "Replace", "pattern": {"String": str(old)}, "content": str(new)}:
                replacements.append((old, new))
            case {"type": "ByteFallback"}:
                has_byte_fallback = True
            case {"type": "Fuse"}:
                pass  # tokens are joined anyway
            case {"type": "Strip", "content": " ", "start": int(start), "stop": 0}:
                num_stripped = start
            case {"type": "Metaspace", "replacement": str(space)}:
                replacements.append((space, " "))
                drops_all_leading = step.get("prepend_scheme", "always") != "never"
            case _:
                raise TokenizerError(
                    f"decoder {step!r} of tokenizer.json is not supported; "
                    "Caesura serves byte-level BPE and SentencePiece tokenizers"
                )

    if is_byte_level:
        return _byte_level, None

    def to_bytes(token: str) -> bytes:
        if has_byte_fallback and (byte := _fallback_byte(token)) is not None:
            return byte
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    def first_to_bytes(token: str) -> bytes:
        text = to_bytes(token)
        if drops_all_leading:
            return text.replace(b" ", b"")
        kept = text.lstrip(b" ")
        return text[min(num_stripped, len(text) - len(kept)) :]

    return to_bytes, first_to_bytes if num_stripped or drops_all_leading else None


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 characters are themselves, other bytes move up to
    U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in sorted(printable)}
    return alphabet | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHARACTER[character] for character in token])
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return token.encode()


def _fallback_byte(token: str) -> bytes | None:
    """The byte of a token like `<0x0A>`."""
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes.fromhex(token[3:5])
        except ValueError:
            return None
    return None
