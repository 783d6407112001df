"""Bugs of the engine's own books: blocks, slots, preemption and the prefix cache."""

from __future__ import annotations

from scripts.mutations.mutation import Edit, Mutation

CORE = "engine_core/core.py"
SCHEDULER = "engine_core/scheduler.py"
POOL = "engine_core/block_pool.py"

MUTATIONS = (
    # -- steps in flight -------------------------------------------------------------------------
    Mutation(
        "freed_under_a_step",
        "The blocks of a request that will end in this step are free before the step has run.",
        Edit(
            SCHEDULER,
            "if self.num_preemptions == num_preemptions:",
            """
            for row in _rows_where(rows.num_computed + rows.num_new == rows.num_known):
                if rows.num_known[row] + 1 >= rows.ends_at[row]:
                    self.pool.release(rows.requests[row].block_ids)
                    rows.publishes_at[row] = NEVER
                    rows.requests[row].block_ids = []
            if self.num_preemptions == num_preemptions:
            """,
        ),
        origin="mini-sglang",
    ),
    Mutation(
        "scheduled_ahead",
        "The next step is chosen ahead of the boundary, where an abort may end its requests.",
        Edit(
            CORE,
            "self._num_arrivals = 0",
            """
            self._num_arrivals = 0
            self._ahead: StepBatch | None = None
            """,
        ),
        Edit(
            CORE,
            "batch = self.scheduler.schedule(now)",
            "batch = self._ahead or self.scheduler.schedule(now)",
        ),
        Edit(
            CORE,
            "elif now - self._last_stats_s >= STATS_INTERVAL_S:",
            """
            self._ahead = self.scheduler.schedule(now) if self._requests else None
            if now - self._last_stats_s >= STATS_INTERVAL_S:
            """,
        ),
        origin="mini-sglang, SGLang #34149",
    ),
    Mutation(
        "oldest_preempted",
        "A request that lacks a block takes one from a row that this step computes.",
        Edit(
            SCHEDULER,
            "victim = self.running.pop()",
            """
            victim = self.running.requests[0]
            self.running.remove(victim)
            """,
        ),
    ),
    Mutation(
        "one_message_a_boundary",
        "A boundary takes one message, and control waits behind data.",
        Edit(
            "engine_core/process/intake.py",
            """
            while True:
                items.append(self._queue.get_nowait())
            """,
            """
            items.append(self._queue.get_nowait())
            return items
            """,
        ),
        origin="SGLang #22511",
    ),
    # -- preemption ------------------------------------------------------------------------------
    Mutation(
        "preempted_tokens_lost",
        "A preempted request begins again at its prompt.",
        Edit(
            SCHEDULER,
            "request.stage = Stage.PREEMPTED",
            """
            request.stage = Stage.PREEMPTED
            del request.token_ids[request.num_prompt_tokens :]
            """,
        ),
    ),
    Mutation(
        "preempted_prompt_told_twice",
        "A request that is preempted in its prefill tells log-probabilities of its prompt twice.",
        Edit(SCHEDULER, "request.prompt_logprobs.clear()", ""),
    ),
    Mutation(
        "preempted_keeps_its_progress",
        "A preempted request takes its KV for computed when it comes back.",
        Edit(
            SCHEDULER,
            "request.num_prefilled_tokens = len(cached) * self.config.block_size",
            """
            if request.stage is Stage.WAITING:
                request.num_prefilled_tokens = len(cached) * self.config.block_size
            """,
        ),
        Edit(
            SCHEDULER,
            """
            request.num_prefilled_tokens = 0
            request.is_of_one_epoch = True
            """,
            """
            request.num_prefilled_tokens = max(0, len(request.token_ids) - 2)
            request.is_of_one_epoch = True
            """,
        ),
    ),
    # -- leaks -----------------------------------------------------------------------------------
    Mutation(
        "prefill_leaks_at_an_abort",
        "A request that is aborted in its prefill keeps its blocks.",
        Edit(
            SCHEDULER,
            """
            self.running.remove(request)
            return self._give_up_blocks(request)
            """,
            """
            self.running.remove(request)
            if request.stage is Stage.PREFILL:
                return 0, 0
            return self._give_up_blocks(request)
            """,
        ),
        origin="FastDeploy #6743",
    ),
    Mutation(
        "aborted_stays_queued",
        "A queued request that is aborted stays in the queue, and runs for nobody.",
        Edit(
            SCHEDULER,
            "(self.held if request in self.held else self.waiting).remove(request)",
            "",
        ),
        origin="SGLang #36876",
    ),
    Mutation(
        "slot_not_returned",
        "A row of the batch is lost with each request that leaves.",
        Edit(SCHEDULER, "self._free_slots.append(request.slot)", ""),
    ),
    Mutation(
        "runner_not_told",
        "The model runner does not hear that a row's request has left.",
        Edit(SCHEDULER, "self._left_slots.append(request.slot)", ""),
    ),
    # -- the prefix cache ------------------------------------------------------------------------
    Mutation(
        "shared_block_taken",
        "A request that leaves takes shared blocks from those who still use them.",
        Edit(POOL, "self._references[block_id] -= 1", "self._references[block_id] = 0"),
    ),
    Mutation(
        "shared_block_evicted",
        "A cached block that is used again may still be evicted.",
        Edit(
            POOL,
            """
            if self._references[block_id] == 0:
                del self._cached[block_id]
            self._references[block_id] += 1
            """,
            "self._references[block_id] += 1",
        ),
    ),
    Mutation(
        "published_before_computed",
        "A prompt's blocks are in the prefix cache before its last chunk is computed.",
        Edit(
            SCHEDULER,
            "num_full = num_computed // self.config.block_size",
            "num_full = len(request.token_ids) // self.config.block_size",
        ),
    ),
    Mutation(
        "hit_behind_a_hole",
        "A prefix's blocks are used although one before them is missing.",
        Edit(
            POOL,
            """
            if (block_id := self._block_by_hash.get(digest)) is None:
                break
            """,
            """
            if (block_id := self._block_by_hash.get(digest)) is None:
                continue
            """,
        ),
    ),
    Mutation(
        "cached_blocks_counted_twice",
        "Blocks that a request shares count as free for what it lacks.",
        Edit(
            SCHEDULER,
            "num_available = self.pool.num_available - self.pool.num_unreferenced(cached)",
            "num_available = self.pool.num_available",
        ),
    ),
    Mutation(
        "nothing_left_to_compute",
        "A prompt that is cached whole leaves no token to compute, and so no logits.",
        Edit(
            SCHEDULER,
            "num_full = (len(request.token_ids) - 1) // self.config.block_size",
            "num_full = len(request.token_ids) // self.config.block_size",
        ),
    ),
    Mutation(
        "hash_without_its_past",
        "A block is found by its own tokens, whatever stood before them.",
        Edit("engine_core/prefix_hash.py", "blake2b(parent + array(", "blake2b(array("),
    ),
    Mutation(
        "hash_without_salt",
        "Tenants with different cache salts share their prefixes.",
        Edit("engine_core/prefix_hash.py", "{cache_salt or ''}", ""),
    ),
)
