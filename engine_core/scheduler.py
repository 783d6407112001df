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

from bisect import insort
from dataclasses import dataclass, replace

from engine_core.batch import JoinedSequence, StepBatch
from engine_core.block_pool import BlockPool
from engine_core.config import SchedulerConfig
from engine_core.prefix_hash import block_hash, root_hash
from engine_core.request import Request, Stage
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
class ScheduledStep:
    """A batch and the requests behind its rows, in row order."""

    batch: StepBatch
    requests: list[Request]


class Scheduler:
    """Owns every live request, its blocks and its slot."""

    def __init__(self, config: SchedulerConfig, num_blocks: int) -> None:
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
        self.running: list[Request] = []
        self.weight_epoch = 0
        self.num_preemptions = 0
        self.num_retractions = 0
        self.num_computed_tokens = 0
        self.prefix_cache = PrefixCacheCounters()
        self._reported = PrefixCacheCounters()
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._left_slots: list[int] = []
        self._holds_newcomers = False

    @property
    def has_work(self) -> bool:
        return bool(self.running) or len(self.waiting) > 0

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
        for request in (*self.waiting, *self.held):
            request.block_hashes.clear()

    # -- a step --------------------------------------------------------------------------------

    def schedule(self, now: float) -> ScheduledStep | None:
        """Choose the next step's rows and allocate their blocks; None if nothing can run."""
        batch = StepBatch()
        requests: list[Request] = []
        budget = self.config.max_num_batched_tokens
        num_preemptions = self.num_preemptions
        index = 0
        while index < len(self.running):
            request = self.running[index]
            computed = request.num_computed_tokens
            # A chunk of prefill leaves a token of budget for each row behind it: none starves.
            num_behind = len(self.running) - index - 1
            num_new = min(len(request.token_ids) - computed, budget - num_behind)
            has_room = computed + num_new <= len(request.block_ids) * self.config.block_size
            if not has_room and not self._grow(request, num_new, batch, now):
                break
            budget -= num_new
            self._append_row(batch, requests, request, num_new)
            index += 1
        if self.num_preemptions == num_preemptions:
            self._admit(batch, requests, budget, now)
        if not requests:
            return None
        batch.left.extend(self._left_slots)
        self._left_slots.clear()
        return ScheduledStep(batch, requests)

    def commit(self, step: ScheduledStep) -> None:
        """Account for an executed step: its tokens are in the cache now."""
        self.num_computed_tokens += sum(step.batch.num_new_tokens)
        block_size = self.config.block_size
        for request, num_new in zip(step.requests, step.batch.num_new_tokens, strict=True):
            request.num_computed_tokens += num_new
            if request.num_computed_tokens // block_size > request.num_published_blocks:
                self._publish(request)
            if request.stage is Stage.PREFILL and request.num_computed_tokens == len(
                request.token_ids
            ):
                request.stage = Stage.DECODE

    def _append_row(
        self, batch: StepBatch, requests: list[Request], request: Request, num_new: int
    ) -> None:
        computed = request.num_computed_tokens
        batch.slots.append(request.slot)
        batch.num_new_tokens.append(num_new)
        batch.num_computed_tokens.append(computed)
        batch.samples.append(computed + num_new == len(request.token_ids))
        requests.append(request)

    # -- blocks --------------------------------------------------------------------------------

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _grow(self, request: Request, num_new: int, batch: StepBatch, now: float) -> bool:
        """Give a running request the blocks it lacks; False if it had to give up its own."""
        num_tokens = request.num_computed_tokens + num_new
        num_missing = self._num_blocks_for(num_tokens) - len(request.block_ids)
        while num_missing > self.pool.num_available:
            victim = self.running.pop()
            self._preempt(victim, now)
            if victim is request:
                return False
        new_blocks = self.pool.allocate(num_missing)
        request.block_ids.extend(new_blocks)
        batch.new_blocks.append((request.slot, new_blocks))
        return True

    def _admit(self, batch: StepBatch, requests: list[Request], budget: int, now: float) -> None:
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
            request.num_computed_tokens = len(cached) * self.config.block_size
            if request.stage is Stage.WAITING:
                self._count_prefix_hit(request)
            request.stage = Stage.PREFILL
            request.slot = self._free_slots.pop()
            request.events.append(EngineCoreEvent(EventType.SCHEDULED, now))
            insort(self.running, request, key=lambda running: running.order)
            batch.joined.append(
                JoinedSequence(
                    slot=request.slot,
                    token_ids=request.token_ids.copy(),
                    num_prompt_tokens=request.num_prompt_tokens,
                    block_ids=request.block_ids.copy(),
                    sampling=request.sampling,
                )
            )
            num_new = min(len(request.token_ids) - request.num_computed_tokens, budget)
            budget -= num_new
            self._append_row(batch, requests, request, num_new)

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
        request.num_computed_tokens = 0
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
        request.slot = -1
        return counts

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

    def _publish(self, request: Request) -> None:
        if not self.config.enable_prefix_caching or not request.is_of_one_epoch:
            return
        num_full = request.num_computed_tokens // self.config.block_size
        self._extend_hashes(request, num_full)
        for index in range(request.num_published_blocks, num_full):
            self.pool.publish(request.block_ids[index], request.block_hashes[index])
        request.num_published_blocks = num_full

    def _extend_hashes(self, request: Request, num_blocks: int) -> None:
        hashes, size = request.block_hashes, self.config.block_size
        if not hashes and num_blocks > 0:
            root = root_hash(self.weight_epoch, request.cache_salt)
            hashes.append(block_hash(root, request.token_ids[:size]))
        while len(hashes) < num_blocks:
            start = len(hashes) * size
            hashes.append(block_hash(hashes[-1], request.token_ids[start : start + size]))

    def _count_prefix_hit(self, request: Request) -> None:
        request.num_cached_tokens = request.num_computed_tokens
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
        slots = [request.slot for request in self.running] + self._free_slots
        if sorted(slots) != list(range(self.config.max_num_seqs)):
            errors.append(f"slots in use or free are {sorted(slots)}")
        errors += [
            f"request {request.request_id} waits but holds {len(request.block_ids)} blocks"
            for request in (*self.waiting, *self.held)
            if request.block_ids
        ]
        return errors
