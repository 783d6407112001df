"""The KV blocks of one engine: who holds them, and which of them are worth keeping.

Invariants
- Each block is in exactly one of three states: *held* (its reference count is positive), *cached*
  (count zero, its contents are known by hash and may be reused) or *free* (count zero, contents
  worthless).
- A hash names at most one block; a held block may have a hash too (others can share it).
- Allocation takes free blocks first, then evicts the cached block released longest ago.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Reference-counted blocks with an LRU of reusable ones. All operations are O(blocks named)."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._block_by_hash: dict[bytes, int] = {}
        # Taken from the end, so that a fresh pool hands out ascending ids: physically consecutive
        # blocks make long contiguous runs, which attention on a CPU likes.
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now."""
        return len(self._free) + len(self._cached)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take blocks, each with one reference. The caller has checked `num_available`."""
        assert num_blocks <= self.num_available, "allocation beyond the pool: check num_available"
        block_ids = []
        for _ in range(num_blocks):
            if self._free:
                block_id = self._free.pop()
            else:
                block_id, _ = self._cached.popitem(last=False)
                self._forget_hash(block_id)
            self._references[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks holding the longest known prefix of a hash chain; takes no references."""
        found = []
        for digest in hashes:
            if (block_id := self._block_by_hash.get(digest)) is None:
                break
            found.append(block_id)
        return found

    def num_unreferenced(self, block_ids: Sequence[int]) -> int:
        """How many of these blocks would leave `num_available` if they were shared."""
        return sum(self._references[block_id] == 0 for block_id in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """Take one more reference on each of these hashed blocks."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                del self._cached[block_id]
            self._references[block_id] += 1

    def publish(self, block_id: int, digest: bytes) -> None:
        """Name the contents of a held, full block. If another block has that name, it stays the one
        found.
        """
        assert self._references[block_id] > 0, "only held blocks are published"
        if self._hashes[block_id] is None and digest not in self._block_by_hash:
            self._hashes[block_id] = digest
            self._block_by_hash[digest] = block_id

    def release(self, block_ids: Sequence[int]) -> tuple[int, int]:
        """Drop one reference on each; returns (blocks freed, blocks left in the prefix cache).

        A block that others still hold counts as left in the cache. Released last to first, so that
        of one sequence the tail, which fewest can share, is evicted before the head.
        """
        num_freed = 0
        for block_id in reversed(block_ids):
            self._references[block_id] -= 1
            if self._references[block_id] > 0:
                continue
            assert self._references[block_id] == 0, f"block {block_id} was released twice"
            if self._hashes[block_id] is None:
                self._free.append(block_id)
                num_freed += 1
            else:
                self._cached[block_id] = None
        return num_freed, len(block_ids) - num_freed

    def flush(self) -> None:
        """Forget every cached prefix; held blocks stay held, but are not found any more."""
        for block_id in self._cached:
            self._free.append(block_id)
        self._cached.clear()
        for block_id in self._block_by_hash.values():
            self._hashes[block_id] = None
        self._block_by_hash.clear()

    def check_integrity(self, held: Iterable[Sequence[int]]) -> list[str]:
        """Compare the books with the block tables `held` of all live sequences; returns what is
        wrong.
        """
        expected = [0] * self.num_blocks
        for table in held:
            for block_id in table:
                expected[block_id] += 1
        errors = [
            f"block {block_id} has {actual} references, but {wanted} sequences hold it"
            for block_id, (actual, wanted) in enumerate(
                zip(self._references, expected, strict=True)
            )
            if actual != wanted
        ]
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free) or free & cached:
            errors.append("a block is free twice, or both free and cached")
        num_held = sum(count > 0 for count in self._references)
        if (total := num_held + len(free) + len(cached)) != self.num_blocks:
            errors.append(f"held + free + cached = {total} of {self.num_blocks} blocks")
        for digest, block_id in self._block_by_hash.items():
            if self._hashes[block_id] != digest or block_id in free:
                errors.append(
                    f"the prefix table points at block {block_id}, which lost its contents"
                )
        return errors

    def _forget_hash(self, block_id: int) -> None:
        digest = self._hashes[block_id]
        if digest is not None:
            del self._block_by_hash[digest]
            self._hashes[block_id] = None
