"""The checksum of a part of a weight update: equal on both ends, the same tensors arrived.

It does not depend on the order of the tensors, so that each can be summed as it arrives and then be
let go. All digests are BLAKE2b (RFC 7693) of 16 bytes:

- A *field* is its length in bytes as 8 bytes, little endian, followed by the bytes.
- A tensor's digest is that of four fields: its name in UTF-8; its dtype as PyTorch spells it,
  without "torch." ("bfloat16"); its shape as decimal numbers with commas between ("1024,3072");
  and its elements in row-major order, as they lie in memory, little endian.
- The checksum is the digest, as 32 hexadecimal digits, of all tensors' digests, one after the
  other, in the order of the tensors' names (sorted by code points).

Tensors are summed as they were sent: before any conversion, and with tensors that are accepted but
not used.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

_DIGEST_BYTES = 16


def weights_checksum(tensors: Mapping[str, Tensor]) -> str:
    """The checksum of tensors by name."""
    checksum = WeightsChecksum()
    for name, tensor in tensors.items():
        checksum.add(name, tensor)
    return checksum.hexdigest()


class WeightsChecksum:
    """The checksum of tensors that come one by one."""

    def __init__(self) -> None:
        self._digests: dict[str, bytes] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a tensor in; one of the same name is replaced."""
        dtype = str(tensor.dtype).removeprefix("torch.")
        shape = ",".join(str(size) for size in tensor.shape)
        elements = tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy()
        digest = blake2b(digest_size=_DIGEST_BYTES)
        for field in (name.encode(), dtype.encode(), shape.encode(), elements.data):
            digest.update(len(field).to_bytes(8, "little"))
            digest.update(field)
        self._digests[name] = digest.digest()

    def hexdigest(self) -> str:
        """Of all tensors so far."""
        total = blake2b(digest_size=_DIGEST_BYTES)
        for _, digest in sorted(self._digests.items()):
            total.update(digest)
        return total.hexdigest()
