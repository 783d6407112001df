"""Continuous batching: which tokens of which requests the next step computes.

Every step has a token budget. Running requests come first (a decode needs one token, an unfinished
prefill the next chunk), then waiting ones are admitted while rows, blocks and budget last. When a
decode finds no block, the running request that comes last in order gives up its blocks and waits to
be recomputed; its sampled tokens stay.

Invariants
- `running` is sorted by `Request.order`, so the victim of a preemption is never ahead of the one
  in need.
- A request is admitted only if all its known tokens fit; one request alone always fits (checked
  at start-up).
- Blocks are published to the prefix cache only after the step that filled them, and only by a
  request whose whole KV is of the present weight epoch.
- While newcomers are held, only requests that have begun before are scheduled.
- A slot is in the running set or free, and the runner hears of each change in the next batch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import compress
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from engine_core.batch import NO_TOKEN, Integers, JoinedSequence, StepBatch
from engine_core.block_pool import BlockPool
from engine_core.config import SchedulerConfig
from engine_core.prefix_hash import block_hash, root_hash
from engine_core.request import Request, Stage
from engine_core.running_rows import NEVER, RunningRows
from engine_core.waiting_queue import WaitingQueue
from ipc.output import EngineCoreEvent, EventType, PrefixCacheStats, SchedulerStats

ADMISSION_HEADROOM = 0.01
"""Share of the blocks that admission leaves free for running requests to grow into."""


@dataclass(slots=True)
class PrefixCacheCounters:
    """What was looked up in the prefix cache, and what was found there."""

    num_requests: int = 0
    num_queried_tokens: int = 0
    num_hit_tokens: int = 0


@dataclass(slots=True)
class SampledTokens:
    """What came of a step's sampling rows."""

    streamed: dict[int, tuple[list[str], list[int]]]
    """By client: the requests that got a token and nothing besides, and their tokens."""
    others: list[tuple[Request, int]]
    """Requests with a token (or NO_TOKEN) that is not appended yet: it may end them, or there is
    more to tell."""


Mask = NDArray[np.bool_]
T = TypeVar("T")


class Scheduler:
    """Owns every live request, its blocks and its slot."""

    def __init__(self, config: SchedulerConfig, num_blocks: int, vocab_size: int) -> None:
        if num_blocks * config.block_size < config.max_model_len:
            raise ValueError(
                f"the KV cache holds {num_blocks * config.block_size} tokens "
                f"({num_blocks} blocks of {config.block_size}), less than "
                f"max_model_len={config.max_model_len}; give it more memory "
                f"(kv_cache_memory_bytes) or lower max_model_len"
            )
        self.config = config
        self.pool = BlockPool(num_blocks)
        self.waiting = WaitingQueue()
        self.held = WaitingQueue()
        """Requests that may not begin yet: a pause holds them."""
        self.running = RunningRows(config.max_num_seqs)
        self.weight_epoch = 0
        self.num_preemptions = 0
        self.num_retractions = 0
        self.num_computed_tokens = 0
        self.prefix_cache = PrefixCacheCounters()
        self._reported = PrefixCacheCounters()
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._left_slots: list[int] = []
        self._holds_newcomers = False
        # By token id: how many running requests end with it. NO_TOKEN, which is -1, finds the last
        # entry, which is never 0.
        self._num_ending = np.zeros(vocab_size + 1, np.int64)
        self._num_ending[NO_TOKEN] = 1

    @property
    def has_work(self) -> bool:
        return len(self.running) > 0 or len(self.waiting) > 0

    @property
    def num_waiting(self) -> int:
        """Requests without blocks, held ones among them."""
        return len(self.waiting) + len(self.held)

    # -- life of a request ---------------------------------------------------------------------

    def add(self, request: Request, now: float) -> None:
        request.events.append(EngineCoreEvent(EventType.QUEUED, now))
        (self.held if self._holds_newcomers else self.waiting).push(request)

    def remove(self, request: Request) -> tuple[int, int]:
        """Take a request out, whatever its stage. Returns (blocks freed, blocks left in the prefix
        cache).
        """
        if request.slot < 0:
            (self.held if request in self.held else self.waiting).remove(request)
            return 0, 0
        self.running.remove(request)
        return self._give_up_blocks(request)

    # -- pauses and updates, between steps -----------------------------------------------------

    def hold_newcomers(self) -> None:
        """Begin nothing from now on: what has not begun is held, and so is what will be added."""
        self._holds_newcomers = True
        for request in [one for one in self.waiting if one.stage is Stage.WAITING]:
            self.waiting.remove(request)
            self.held.push(request)

    def release_newcomers(self) -> None:
        """What was held may begin, in its order."""
        self._holds_newcomers = False
        for request in self.held:
            self.waiting.push(request)
        self.held = WaitingQueue()

    def retract_running(self) -> tuple[int, int, int]:
        """Free the KV of every running request; each waits at its old place to be recomputed.
        Returns (requests, blocks freed, blocks left in the prefix cache).
        """
        num_requests = len(self.running)
        self.num_retractions += num_requests
        num_freed = num_cached = 0
        while self.running:
            freed, cached = self._send_back(self.running.pop())
            num_freed, num_cached = num_freed + freed, num_cached + cached
        return num_requests, num_freed, num_cached

    def begin_weight_epoch(self) -> None:
        """The next step runs under new weights: KV of the old ones is found by nobody any more."""
        self.weight_epoch += 1
        for request in self.running:
            request.is_of_one_epoch = False
        self.running.publishes_at[:] = NEVER
        for request in (*self.waiting, *self.held):
            request.block_hashes.clear()

    # -- a step --------------------------------------------------------------------------------

    def schedule(self, now: float) -> StepBatch | None:
        """Choose the next step's rows and allocate their blocks; None if nothing can run.

        Each row computes one token and may compute more in prefill, as far as the budget lasts: so
        none starves behind a long prompt.
        """
        batch = StepBatch()
        rows, num_preemptions = self.running, self.num_preemptions
        num_extra = 0
        is_long = rows.num_known - rows.num_computed > 1
        lacks_block = rows.num_computed >= rows.num_fitting
        for row in _rows_where(is_long | lacks_block):
            if row >= len(rows):
                break  # It gave up its blocks for one before it.
            request = rows.requests[row]
            num_missing = len(request.token_ids) - request.num_computed_tokens
            num_left = self.config.max_num_batched_tokens - len(rows) - num_extra
            num_new = min(num_missing, 1 + num_left)
            rows.num_new[row] = num_new
            num_extra += num_new - 1
            if lacks_block[row]:
                self._grow(row, batch, now)
        if self.num_preemptions == num_preemptions:
            self._admit(batch, self.config.max_num_batched_tokens - len(rows) - num_extra, now)
        if not rows:
            return None
        batch.left.extend(self._left_slots)
        self._left_slots.clear()
        return replace(
            batch,
            slots=rows.slots.copy(),
            num_new_tokens=rows.num_new.copy(),
            num_computed_tokens=rows.num_computed.copy(),
            samples=rows.num_computed + rows.num_new == rows.num_known,
        )

    def commit(self, token_ids: Integers) -> SampledTokens:
        """Account for the step that was scheduled and executed: its tokens are in the cache now.

        `token_ids` has one for each row that sampled. It is appended, unless its request is one of
        the `others`, with which the caller must deal before the next step.
        """
        rows = self.running
        rows.num_computed += rows.num_new
        self.num_computed_tokens += int(rows.num_new.sum())
        for row in _rows_where(rows.num_computed >= rows.publishes_at):
            self._publish(row)
        samples = rows.num_computed == rows.num_known
        all_sample = len(token_ids) == len(rows)
        if not all_sample:
            tokens_of_some, token_ids = token_ids, np.full(len(rows), NO_TOKEN)
            token_ids[samples] = tokens_of_some
        rows.num_known += samples
        is_other = rows.num_known >= rows.ends_at
        is_other |= rows.comes_alone + self._num_ending[token_ids] > 0
        for row in _rows_where(rows.is_prefilling > 0):
            request = rows.requests[row]
            request.num_prefilled_tokens = int(rows.num_computed[row])
            rows.num_new[row] = 1
            if samples[row]:
                request.stage = Stage.DECODE
                rows.is_prefilling[row] = 0
                rows.comes_alone[row] = request.sampling.logprobs is not None
        others = _rows_where(is_other if all_sample else is_other & samples)
        streams = None if all_sample and not others else samples & ~is_other
        return self._deal_out(token_ids.tolist(), others, streams)

    def _deal_out(
        self, token_ids: list[int], others: list[int], streams: Mask | None
    ) -> SampledTokens:
        """Sort the tokens of all rows, and append those that are streamed: all, if `streams` is
        None.
        """
        rows = self.running
        of_others = [(rows.requests[row], token_ids[row]) for row in others]
        streamed = {}
        for client_index in rows.num_by_client:
            mask = streams
            if len(rows.num_by_client) > 1:
                is_its = rows.clients == client_index
                mask = is_its if streams is None else is_its & streams
            chosen = None if mask is None else mask.tolist()
            tokens = _select(token_ids, chosen)
            for known, token_id in zip(_select(rows.token_ids, chosen), tokens, strict=True):
                known.append(token_id)
            streamed[client_index] = _select(rows.request_ids, chosen), tokens
        return SampledTokens(streamed, of_others)

    # -- blocks --------------------------------------------------------------------------------

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _grow(self, row: int, batch: StepBatch, now: float) -> None:
        """Give a decoding row the block it lacks; or it gives up its own, if it is the last one."""
        request = self.running.requests[row]
        while self.pool.num_available == 0:
            victim = self.running.pop()
            self._preempt(victim, now)
            if victim is request:
                return
        new_blocks = self.pool.allocate(1)
        request.block_ids.extend(new_blocks)
        batch.new_blocks.append((request.slot, new_blocks))
        self.running.num_fitting[row] += self.config.block_size

    def _admit(self, batch: StepBatch, budget: int, now: float) -> None:
        while budget > 0 and self._free_slots and (request := self.waiting.peek()) is not None:
            cached = self._find_cached_prefix(request)
            num_missing = self._num_blocks_for(len(request.token_ids)) - len(cached)
            headroom = int(ADMISSION_HEADROOM * self.pool.num_blocks) if self.running else 0
            num_available = self.pool.num_available - self.pool.num_unreferenced(cached)
            if num_missing + headroom > num_available:
                break
            self.waiting.remove(request)
            self.pool.share(cached)
            request.block_ids = cached + self.pool.allocate(num_missing)
            request.num_published_blocks = len(cached)
            request.num_prefilled_tokens = len(cached) * self.config.block_size
            if request.stage is Stage.WAITING:
                self._count_prefix_hit(request)
            request.stage = Stage.PREFILL
            request.slot = self._free_slots.pop()
            request.events.append(EngineCoreEvent(EventType.SCHEDULED, now))
            batch.joined.append(
                JoinedSequence(
                    slot=request.slot,
                    token_ids=request.token_ids.copy(),
                    num_prompt_tokens=request.num_prompt_tokens,
                    block_ids=request.block_ids.copy(),
                    sampling=request.sampling,
                )
            )
            num_new = min(len(request.token_ids) - request.num_prefilled_tokens, budget)
            budget -= num_new
            self.running.insert(
                request,
                num_new=num_new,
                num_fitting=len(request.block_ids) * self.config.block_size,
                publishes_at=self._publishes_at(request),
            )
            self._num_ending[self._ending_ids(request)] += 1

    def _preempt(self, request: Request, now: float) -> None:
        """Take the blocks of a request (already out of `running`) for another one."""
        self._send_back(request)
        request.events.append(EngineCoreEvent(EventType.PREEMPTED, now))
        self.num_preemptions += 1

    def _send_back(self, request: Request) -> tuple[int, int]:
        """A request (already out of `running`) waits again; its tokens will be recomputed. Returns
        (blocks freed, blocks left in the prefix cache).
        """
        counts = self._give_up_blocks(request)
        request.stage = Stage.PREEMPTED
        request.num_prefilled_tokens = 0
        request.is_of_one_epoch = True
        request.block_hashes.clear()
        request.prompt_logprobs.clear()
        self.waiting.push(request)
        request.num_preemptions += 1
        return counts

    def _give_up_blocks(self, request: Request) -> tuple[int, int]:
        counts = self.pool.release(request.block_ids)
        request.block_ids = []
        self._left_slots.append(request.slot)
        self._free_slots.append(request.slot)
        self._num_ending[self._ending_ids(request)] -= 1
        request.slot = -1
        return counts

    def _ending_ids(self, request: Request) -> list[int]:
        """The tokens that can end it: none outside the vocabulary is ever sampled."""
        return [one for one in request.ending_token_ids if one < len(self._num_ending) - 1]

    # -- prefix cache --------------------------------------------------------------------------

    def _find_cached_prefix(self, request: Request) -> list[int]:
        """Blocks of the longest cached prefix; at least the last token is left to compute."""
        if (
            not self.config.enable_prefix_caching
            or request.sampling.skip_reading_prefix_cache
            or request.owes_prompt_logprobs
        ):
            return []
        num_full = (len(request.token_ids) - 1) // self.config.block_size
        self._extend_hashes(request, num_full)
        return self.pool.find(request.block_hashes[:num_full])

    def _publishes_at(self, request: Request) -> int:
        """With how many tokens computed its next block is full, if others may ever share it."""
        if not self.config.enable_prefix_caching or not request.is_of_one_epoch:
            return NEVER
        return (request.num_published_blocks + 1) * self.config.block_size

    def _publish(self, row: int) -> None:
        request, num_computed = self.running.requests[row], int(self.running.num_computed[row])
        num_full = num_computed // self.config.block_size
        self._extend_hashes(request, num_full)
        for index in range(request.num_published_blocks, num_full):
            self.pool.publish(request.block_ids[index], request.block_hashes[index])
        request.num_published_blocks = num_full
        self.running.publishes_at[row] = self._publishes_at(request)

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        hashes, size = request.block_hashes, self.config.block_size
        if not hashes and num_blocks > 0:
            root = root_hash(self.weight_epoch, request.cache_salt)
            hashes.append(block_hash(root, request.token_ids[:size]))
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            hashes.append(block_hash(hashes[-1], request.token_ids[start : start + size]))

    def _count_prefix_hit(self, request: Request) -> None:
        request.num_cached_tokens = request.num_prefilled_tokens
        self.prefix_cache.num_requests += 1
        self.prefix_cache.num_queried_tokens += len(request.token_ids)
        self.prefix_cache.num_hit_tokens += request.num_cached_tokens

    # -- books ---------------------------------------------------------------------------------

    def take_stats(self, step_counter: int) -> SchedulerStats:
        """How much there is to do now, and what the prefix cache gave since the last call."""
        now, before = self.prefix_cache, self._reported
        self._reported = replace(now)
        return SchedulerStats(
            num_running_reqs=len(self.running),
            num_waiting_reqs=self.num_waiting,
            step_counter=step_counter,
            kv_cache_usage=1.0 - self.pool.num_available / self.pool.num_blocks,
            prefix_cache_stats=PrefixCacheStats(
                requests=now.num_requests - before.num_requests,
                queries=now.num_queried_tokens - before.num_queried_tokens,
                hits=now.num_hit_tokens - before.num_hit_tokens,
            ),
        )

    def check_integrity(self) -> list[str]:
        """Everything that is wrong with the books; empty when all is well. O(blocks held)."""
        errors = self.pool.check_integrity(request.block_ids for request in self.running)
        errors += self.running.check_integrity(self.config.block_size)
        slots = [request.slot for request in self.running] + self._free_slots
        if sorted(slots) != list(range(self.config.max_num_seqs)):
            errors.append(f"slots in use or free are {sorted(slots)}")
        ending = [len(self._ending_ids(request)) for request in self.running]
        if self._num_ending.sum() != 1 + sum(ending):
            errors.append(f"ending tokens are counted {self._num_ending.sum()} times")
        errors += [
            f"request {request.request_id} waits but holds {len(request.block_ids)} blocks"
            for request in (*self.waiting, *self.held)
            if request.block_ids
        ]
        return errors


def _rows_where(mask: Mask) -> list[int]:
    return mask.nonzero()[0].tolist()


def _select(column: list[T], chosen: list[bool] | None) -> list[T]:
    """The chosen rows of a column, or a copy of it all."""
    return column.copy() if chosen is None else list(compress(column, chosen))
