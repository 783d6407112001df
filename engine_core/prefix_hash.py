"""Hashes that name the contents of full KV blocks.

A block's hash chains its tokens to all tokens before it, so equal hashes mean equal prefixes and
one table lookup a block finds the longest cached prefix. The chain starts from the weight epoch and
the request's cache salt: KV computed under other weights, or under another tenant's salt, can never
match.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

DIGEST_SIZE = 16


def root_hash(weight_epoch: int, cache_salt: str | None) -> bytes:
    """The parent of a chain's first block."""
    return blake2b(f"{weight_epoch}\0{cache_salt or ''}".encode(), digest_size=DIGEST_SIZE).digest()


def block_hash(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of the block that holds `token_ids`, behind the block (or root) `parent`."""
    return blake2b(parent + array("q", token_ids).tobytes(), digest_size=DIGEST_SIZE).digest()
