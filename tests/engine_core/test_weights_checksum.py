"""The checksum of weights, as anybody can compute it from its description."""

from __future__ import annotations

from hashlib import blake2b

import torch

from engine_core.model.checksum import weights_checksum

TENSORS = {
    "model.norm.weight": torch.tensor([1.0, -2.0, 0.5], dtype=torch.bfloat16),
    "lm_head.weight": torch.arange(6, dtype=torch.float32).view(2, 3),
}


def field(content: bytes) -> bytes:
    return len(content).to_bytes(8, "little") + content


def digest(*fields: bytes) -> bytes:
    return blake2b(b"".join(field(content) for content in fields), digest_size=16).digest()


def test_the_checksum_is_what_its_description_says() -> None:
    elements = b"".join(bytes.fromhex(number) for number in ("803f", "00c0", "003f"))
    norm = digest(b"model.norm.weight", b"bfloat16", b"3", elements)
    head = digest(
        b"lm_head.weight", b"float32", b"2,3", TENSORS["lm_head.weight"].numpy().tobytes()
    )
    expected = blake2b(head + norm, digest_size=16).hexdigest()
    assert weights_checksum(TENSORS) == expected == "2e69abb66a327b5c7e3e87b01f9f85be"


def test_the_order_and_the_layout_in_memory_do_not_matter() -> None:
    laid_out = TENSORS["lm_head.weight"].t().contiguous().t()
    assert not laid_out.is_contiguous()
    reordered = {"model.norm.weight": TENSORS["model.norm.weight"], "lm_head.weight": laid_out}
    for tensors in (dict(reversed(TENSORS.items())), reordered):
        assert weights_checksum(tensors) == weights_checksum(TENSORS)


def test_every_bit_and_every_label_matters() -> None:
    head = TENSORS["lm_head.weight"]
    sums = {
        weights_checksum({"a": head}),
        weights_checksum({"b": head}),
        weights_checksum({"a": head.view(3, 2)}),
        weights_checksum({"a": head.view(torch.int32)}),
        weights_checksum({"a": head.nextafter(torch.ones(()))}),
        weights_checksum({"a": head, "b": head}),
        weights_checksum({}),
    }
    assert len(sums) == 7
