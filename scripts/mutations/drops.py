"""Bugs of aborts that nobody asks for by name: dropped streams and deadlines."""

from __future__ import annotations

from scripts.mutations.mutation import Edit, Mutation

ABORTS = "engine_core/aborts.py"
EXPLICIT = "frontend/requests/explicit_abort.py"
QUEUE = "frontend/requests/abort_queue.py"
AUTO = "frontend/requests/auto_aborts.py"
DISPATCHER = "frontend/requests/dispatcher.py"

MUTATIONS = (
    # -- dropped streams -------------------------------------------------------------------------
    Mutation(
        "drop_forgotten",
        "A dropped request is forgotten before its abort is sent, and decodes for nobody.",
        Edit(
            DISPATCHER,
            'self._end(entry, Terminal("abort", abort_cause=cause), abort_in_engine=cause)',
            'self._end(entry, Terminal("abort", abort_cause=cause))',
        ),
        origin="SGLang #35255",
    ),
    Mutation(
        "forgotten_stream_runs_on",
        "A stream that nobody holds any more is not dropped.",
        Edit(
            "frontend/requests/stream.py",
            """
            if not self._is_done:
                self._drop_later()
            """,
            "pass",
        ),
        origin="SGLang #37833",
    ),
    Mutation(
        "one_frame_a_drop",
        "A thousand drops are a thousand ABORT frames.",
        Edit(AUTO, "if self._timer is None:\n    self._start_timer()", "self.flush()"),
        origin="vLLM",
    ),
    Mutation(
        "linger_without_end",
        "Drops that keep coming put off their ABORT frame for ever.",
        Edit(
            QUEUE,
            "min(self._last_push_s + self._linger_s, self._first_push_s + MAX_LINGER_S)",
            "self._last_push_s + self._linger_s",
        ),
    ),
    Mutation(
        "split_loses_ids",
        "A storm that is split over several frames loses an id at each cut.",
        Edit(
            QUEUE,
            "request_ids[start : start + MAX_IDS_PER_FRAME]",
            "request_ids[start : start + MAX_IDS_PER_FRAME - 1]",
        ),
    ),
    Mutation(
        "failed_send_costs_the_others",
        "ABORT frames behind one that could not be sent are lost.",
        Edit(
            AUTO,
            """
            for frame in frames:
                self._send_frame(frame)
            """,
            """
            try:
                for frame in frames:
                    self._send_frame(frame)
            except EngineDeadError:
                pass
            """,
        ),
        Edit(
            AUTO,
            """
            except EngineDeadError as error:
                logger.warning(
            """,
            """
            except EngineDeadError as error:
                raise
                logger.warning(
            """,
        ),
    ),
    Mutation(
        "end_never_confirmed",
        "An engine does not say that an aborted request has left it.",
        Edit(ABORTS, "outbox.confirm_end(request.client_index, request.request_id)", ""),
    ),
    Mutation(
        "gone_not_confirmed_again",
        "An engine keeps silent about the abort of a request that has left it before.",
        Edit(ABORTS, "outbox.confirm_end(client_index, request_id)", "continue"),
        origin="FastDeploy #7642",
    ),
    Mutation(
        "silent_abort_is_told",
        "A request that an ABORT frame ended gets a terminal all the same.",
        Edit(ABORTS, "self._end(request, outbox))", "self._end_aloud(request, outbox))"),
    ),
    # -- deadlines -------------------------------------------------------------------------------
    Mutation(
        "deadline_of_a_sibling",
        "The deadlines of a call's requests all end its first one.",
        Edit(
            "frontend/requests/intake.py",
            "call_later(new.timeout_s, self._on_deadline, entry)",
            "call_later(new.timeout_s, self._on_deadline, entries[0])",
        ),
    ),
    Mutation(
        "deadline_outlives_its_request",
        "A deadline is not cancelled, and ends whoever has the name by then.",
        Edit(
            DISPATCHER,
            """
            if entry.deadline is not None:
                entry.deadline.cancel()
            """,
            "",
        ),
        Edit(
            "frontend/requests/intake.py",
            "entry.deadline = self._loop.call_later(new.timeout_s, self._on_deadline, entry)",
            """
            def expire(name: str = entry.request_id) -> None:
                for one in self._dispatcher.registry.select_names([name])[name]:
                    self._on_deadline(one)

            entry.deadline = self._loop.call_later(new.timeout_s, expire)
            """,
        ),
    ),
    Mutation(
        "deadline_waits_for_its_engine",
        "A deadline does not hold where the engine keeps silent.",
        Edit(
            EXPLICIT,
            """
            self._dispatcher.end_without_engine(
                [entry for entry in entries if entry.terminal is None],
                Terminal("abort", abort_cause=AbortCause.DEADLINE),
            )
            """,
            "",
        ),
    ),
)
