"""Which operation met requests in which stage: a table whose empty cells ask for a reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

Pair = tuple[str, str]
"""(operation, stage)"""

STAGES = (
    "tokenizing",
    "held",
    "sent",
    "waiting",
    "prefill",
    "decode",
    "kept",
    "preempted",
    "retracted",
    "leaving",
    "unread",
    "ending",
    "finished",
    "unknown",
)
"""`held`: a pause keeps it from beginning, in the front end or in its engine. `kept`: a pause froze
it with its KV; `retracted`: a pause or a flush took that, and no step has computed any since.
`sent`: its ADD is on its way. `leaving`: it ended in its engine, and that word is on its way.
`unread`: its reader is behind. `ending`: it ended here, and its engine does not know yet.
"""

OPERATIONS = (
    "close",
    "cancel",
    "forget",
    "abort id",
    "abort batch",
    "abort prefix",
    "abort tag",
    "abort all",
    "deadline",
    "stop string",
    "duplicate id",
    "engine crash",
    "engine shutdown",
    "corrupt frame",
    "shutdown",
    "frontend crash",
    "list",
    "pause abort",
    "pause wait",
    "pause keep",
    "pause retract",
    "resume",
    "lease end",
    "flush",
    "update",
    "label",
    "resume_from",
)

ENDING_OPERATIONS = {
    *("abort id", "abort batch", "abort prefix", "abort tag", "abort all", "pause abort"),
    *("deadline", "shutdown", "engine shutdown"),
}
"""Who continues a request that one of these ended continues it from where it was found."""

IMPOSSIBLE: dict[Pair, str] = {}


def _rule_out(operations: Iterable[str], stages: Iterable[str], reason: str) -> None:
    for operation in operations:
        for stage in stages:
            IMPOSSIBLE[operation, stage] = reason


_rule_out(
    OPERATIONS,
    ["unknown"],
    "only an id can name what never was",
)
del IMPOSSIBLE["abort id", "unknown"]
_rule_out(
    ["abort batch", "abort prefix", "abort tag", "abort all", "deadline", "stop string"],
    ["ending", "finished"],
    "it finds live requests only",
)
_rule_out(["stop string"], ["tokenizing", "held", "sent", "waiting"], "there is no output yet")
_rule_out(
    ["resume_from"],
    ["tokenizing", "unread", "leaving", "ending", "finished"],
    "it continues what an abort ended, from where that found it, behind a prompt that is known",
)
_rule_out(
    ["engine crash", "engine shutdown", "corrupt frame"],
    ["tokenizing", "finished"],
    "no engine knows of it",
)


def table(seen: Counter[Pair]) -> str:
    """The counts, one row an operation; `-` marks what cannot be."""
    width = max(map(len, OPERATIONS))
    lines = [" " * width + "".join(f"{stage:>12}" for stage in STAGES)]
    for operation in OPERATIONS:
        cells = [
            "-" if (operation, stage) in IMPOSSIBLE else str(seen[operation, stage])
            for stage in STAGES
        ]
        lines.append(f"{operation:<{width}}" + "".join(f"{cell:>12}" for cell in cells))
    return "\n".join(lines)


def missing(seen: Counter[Pair]) -> list[Pair]:
    """Possible pairs that never met."""
    return [
        (operation, stage)
        for operation in OPERATIONS
        for stage in STAGES
        if not seen[operation, stage] and (operation, stage) not in IMPOSSIBLE
    ]
