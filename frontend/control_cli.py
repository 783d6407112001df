"""The control commands: `caesura abort|pause|resume|status --url URL ...`, over HTTP.

All servers are asked at once. Each has one report: of an answer on stdout, of a failure on stderr,
with `--json` all on stdout. The status is 0 if all did as they were told, 1 if some did not or not
in time, 2 for a wrong usage.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from frontend.control_client import Call, Outcome, Reply, call_all

DEFAULT_URL = "http://127.0.0.1:8000"
DEFAULT_TIMEOUT_S = 5.0
WAIT_TIMEOUT_S = 60.0
"""Of a pause that lets requests finish."""
MAX_TIMEOUT_S = 600.0
API_KEY_VARIABLE = "CAESURA_API_KEY"
_SERVERS_SHARE = 0.9
"""Of the time-out: so that a server that has not done all in time still says what it has."""


@dataclass(frozen=True, slots=True)
class Command:
    """A call to servers, and its reply in words."""

    call: Call
    tell: Callable[[Reply], str]


# -- the flags -------------------------------------------------------------------------------------


def add_commands(commands: argparse._SubParsersAction[Any]) -> None:
    """Add the parsers. What they parse has a `make_command`, and is for `run`."""
    abort = _add(commands, "abort", _abort, "abort requests, and wait for the effect")
    which = abort.add_argument_group("which requests (one of these)")
    which.add_argument("ids", nargs="*", metavar="ID", help="exact ids, of requests or of calls")
    which.add_argument("--prefix", metavar="TEXT", help="those whose ids begin so")
    which.add_argument("--tag", metavar="TAG", help="those with this tag")
    which.add_argument("--all", action="store_true", help="every one")

    pause = _add(commands, "pause", _pause, "pause all engines, and wait until they stand still")
    pause.add_argument(
        "--mode",
        choices=("abort", "wait", "keep", "retract"),
        default="keep",
        help="requests that have begun: end them, let them finish, freeze them with their KV, or "
        "free it and recompute it later (default keep)",
    )
    pause.add_argument("--clear-cache", action="store_true", help="empty the prefix cache")
    pause.add_argument(
        "--newcomers",
        choices=("hold", "reject"),
        default="hold",
        help="requests that come meanwhile: hold them, or refuse them with 503 (default hold)",
    )
    pause.add_argument(
        "--lease", type=_lease, metavar="S", help="resume after so many seconds (default: never)"
    )
    pause.add_argument("--pause-id", metavar="ID", help="a name for the pause (default: random)")

    resume = _add(commands, "resume", _resume, "resume all engines, from any state")
    resume.add_argument("--pause-id", metavar="ID", help="only if this pause holds (default: any)")

    _add(commands, "status", _status, "tell the state of servers and their engines")


def _add(
    commands: argparse._SubParsersAction[Any],
    name: str,
    make_command: Callable[[argparse.Namespace], Command],
    what: str,
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=f"{what.capitalize()}.", allow_abbrev=False
    )
    parser.set_defaults(make_command=make_command, parser=parser)
    group = parser.add_argument_group("servers")
    group.add_argument(
        "--url",
        dest="urls",
        type=_url,
        action="append",
        metavar="URL",
        help=f"a server; may be repeated (default {DEFAULT_URL})",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        default=os.environ.get(API_KEY_VARIABLE),
        help=f"the servers' admin key (default: the environment's {API_KEY_VARIABLE})",
    )
    group.add_argument(
        "--timeout",
        type=float,
        default=None,
        metavar="S",
        help=f"seconds for all of them together (default {DEFAULT_TIMEOUT_S:g}; {WAIT_TIMEOUT_S:g} "
        "for `pause --mode wait`)",
    )
    group.add_argument("--json", action="store_true", help="one JSON object a line")
    return parser


def _url(text: str) -> SplitResult:
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no URL: {error}") from None
    if "://" not in text:
        raise argparse.ArgumentTypeError(f"{text!r} has no scheme; did you mean http://{text}?")
    if url.scheme not in ("http", "https") or not url.hostname or url.query or url.fragment:
        raise argparse.ArgumentTypeError(f"{text!r} is no server's URL; it is like {DEFAULT_URL}")
    return url


def _lease(text: str) -> float:
    try:
        lease_s = float(text)
    except ValueError:
        lease_s = 0.0
    if not 0 < lease_s < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds above 0")
    return lease_s


# -- the commands ----------------------------------------------------------------------------------


def _abort(flags: argparse.Namespace) -> Command:
    selectors: Reply = {}
    if flags.ids:
        selectors["request_id"] = flags.ids
    for name in ("prefix", "tag"):
        if getattr(flags, name) is not None:
            selectors[name] = getattr(flags, name)
    if flags.all:
        selectors["abort_all"] = True
    if len(selectors) != 1:
        flags.parser.error("name the requests by ids, or by one of --prefix, --tag and --all")
    body = selectors | {"timeout_s": flags.timeout * _SERVERS_SHARE}
    return _post("/v1/abort", body, ("requests", "engines", *_BLOCKS), _tell_abort)


def _pause(flags: argparse.Namespace) -> Command:
    body = {
        "mode": flags.mode,
        "clear_cache": flags.clear_cache,
        "newcomers": flags.newcomers,
        "lease_s": flags.lease,
        "pause_id": flags.pause_id,
        "timeout_s": flags.timeout * _SERVERS_SHARE,
    }
    fields = ("pause_id", "state", "duration_s", "engines", *_PAUSE_COUNTS)
    return _post("/v1/pause", body, fields, _tell_pause)


def _resume(flags: argparse.Namespace) -> Command:
    fields = ("was", "pause_id", "paused_for_s", "num_released", "engines")
    body = {"pause_id": flags.pause_id, "timeout_s": flags.timeout * _SERVERS_SHARE}
    return _post("/v1/resume", body, fields, _tell_resume)


def _status(flags: argparse.Namespace) -> Command:
    call = Call("GET", "/v1/status", None, frozenset({"state", "shutdown_left_s", "engines"}))
    return Command(call, _tell_status)


def _post(path: str, body: Reply, fields: tuple[str, ...], tell: Callable[[Reply], str]) -> Command:
    given = {name: value for name, value in body.items() if value is not None}
    return Command(Call("POST", path, given, frozenset(fields)), tell)


def run(flags: argparse.Namespace) -> int:
    """Returns the exit status."""
    if flags.timeout is None:
        is_wait = getattr(flags, "mode", None) == "wait"
        flags.timeout = WAIT_TIMEOUT_S if is_wait else DEFAULT_TIMEOUT_S
    if not 0 < flags.timeout <= MAX_TIMEOUT_S:
        flags.parser.error(
            f"argument --timeout: {flags.timeout:g} must be above 0 and at most {MAX_TIMEOUT_S:g}"
        )
    command: Command = flags.make_command(flags)
    urls: list[SplitResult] = flags.urls or [urlsplit(DEFAULT_URL)]
    all_ok = True
    for outcome in call_all(urls, command.call, api_key=flags.api_key, timeout_s=flags.timeout):
        is_ok = outcome.reply is not None and _is_done(outcome.reply)
        all_ok = all_ok and is_ok
        if flags.json:
            _print_json(outcome, is_ok)
        elif outcome.reply is not None:
            _print(f"{outcome.url}: {command.tell(outcome.reply)}")
        else:
            print(f"{outcome.url}: error: {outcome.error}", file=sys.stderr)
    return 0 if all_ok else 1


def _print_json(outcome: Outcome, is_ok: bool) -> None:
    fields: Reply = {"url": outcome.url, "ok": is_ok}
    if outcome.reply is None:
        fields["error"] = outcome.error
    else:
        fields["reply"] = outcome.reply
    _print(json.dumps(fields))


def _print(line: str) -> None:
    """Where nobody reads any more, as after `| head`, the calls and the exit status still count."""
    try:
        print(line, flush=True)
    except BrokenPipeError:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())


def _is_done(reply: Reply) -> bool:
    """Whether what was asked for has happened, everywhere and for every request."""
    requests = reply.get("requests", {}).values()
    return not any(engine in ("timeout", "error") for engine in reply["engines"].values()) and (
        not any(request["status"] in ("pending", "engine_error") for request in requests)
    )


# -- replies in words ------------------------------------------------------------------------------

_BLOCKS = ("num_blocks_freed", "num_blocks_cached")
_PAUSE_COUNTS = ("num_aborted", "num_kept", "num_retracted", "num_held")


def _tell_abort(reply: Reply) -> str:
    counts = Counter(request["status"] for request in reply["requests"].values())
    found = ", ".join(f"{number} {status}" for status, number in sorted(counts.items()))
    blocks = f"{reply['num_blocks_freed']} blocks freed, {reply['num_blocks_cached']} still cached"
    return f"{found or 'nothing to abort'}; {blocks}{_tell_engines(reply)}"


def _tell_pause(reply: Reply) -> str:
    counts = ", ".join(f"{reply[name]} {name.removeprefix('num_')}" for name in _PAUSE_COUNTS)
    return (
        f"{reply['state']} after {reply['duration_s']:.3f} s (pause_id {reply['pause_id']}): "
        f"{counts}{_tell_engines(reply)}"
    )


def _tell_resume(reply: Reply) -> str:
    if reply["was"] == "running":
        return f"was running{_tell_engines(reply)}"
    return (
        f"resumed after {reply['paused_for_s']:.3f} s (pause_id {reply['pause_id']}): "
        f"{reply['num_released']} released{_tell_engines(reply)}"
    )


def _tell_engines(reply: Reply) -> str:
    """Those that did not do as they were told."""
    faults = [f"engine {rank}: {word}" for rank, word in reply["engines"].items() if word != "ok"]
    return "".join(f"; {fault}" for fault in faults)


def _tell_status(reply: Reply) -> str:
    """A line about the server, and a table of its engines."""
    parts = [f"{reply['state']} for {reply['for_s']:.1f} s"]
    if reply["state"] != "running":
        held = f"newcomers: {reply['newcomers']}, {reply['num_held']} held"
        parts += [f"{reply['mode']}, pause_id {reply['pause_id']}", held]
    if reply["shutdown_left_s"] is not None:
        parts.insert(0, f"shutting down, {reply['shutdown_left_s']:.1f} s left")
    if reply["lease_left_s"] is not None:
        parts.append(f"resumes in {reply['lease_left_s']:.1f} s")
    is_served = any(card["state"] != "dead" for card in reply["engines"].values())
    version = reply["weight_version"] or ("differ" if is_served else "-")
    parts += [f"{reply['num_live_requests']} requests", f"weights {version}"]
    rows = [_COLUMNS, *(_engine_row(rank, card) for rank, card in reply["engines"].items())]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    return "\n  ".join(["; ".join(parts), *table])


_COLUMNS = ("engine", "state", "running", "waiting", "free", "cached", "blocks", "steps", "weights")


def _engine_row(rank: str, card: Reply) -> tuple[str, ...]:
    """Of an engine that said nothing only the first two."""
    names = ("num_running", "num_waiting", "num_free_blocks", "num_cached_blocks", "num_blocks")
    told = [str(card.get(name, "-")) for name in (*names, "num_steps", "weight_version")]
    faults = "".join(f" ! {fault}" for fault in card.get("integrity_errors", ()))
    return (rank, card["state"], *told[:-1], told[-1] + faults)
