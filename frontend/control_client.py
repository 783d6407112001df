"""One control call to several servers at once, each within the same time.

Invariants
- None of the servers, whatever it does, delays or prevents another's outcome, nor the last one: one
  that drips, hangs or cannot be resolved is given up when the time is over.
- Everything that can go wrong with a server is an outcome in words.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from ssl import SSLCertVerificationError, SSLError
from typing import Any
from urllib.parse import SplitResult

Reply = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Call:
    """The same for all servers."""

    method: str
    path: str
    body: Reply | None
    fields: frozenset[str]
    """What a reply has; one without them is no Caesura server's."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a call at one server. Either `reply` or `error` is set."""

    url: str
    reply: Reply | None = None
    error: str = ""


class _Refused(Exception):
    """A server answered, and not as it was asked to."""


def call_all(
    urls: Sequence[SplitResult], call: Call, *, api_key: str | None, timeout_s: float
) -> Iterator[Outcome]:
    """The outcomes as they come, one of each server."""
    deadline_s = time.monotonic() + timeout_s
    outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()

    def ask(url: SplitResult) -> None:
        outcomes.put(_call_one(url, call, api_key, timeout_s))

    waiting = dict.fromkeys(url.geturl() for url in urls)
    for url in {url.geturl(): url for url in urls}.values():
        # A daemon: a look-up of a name cannot be stopped, and nobody is to wait for it.
        threading.Thread(target=ask, args=(url,), daemon=True).start()
    while waiting:
        try:
            outcome = outcomes.get(timeout=max(0.0, deadline_s - time.monotonic()))
        except queue.Empty:
            break
        del waiting[outcome.url]
        yield outcome
    for url_text in waiting:
        yield Outcome(url_text, error=_no_answer(timeout_s))


def _no_answer(timeout_s: float) -> str:
    return f"no answer within {timeout_s:g} s"


def _call_one(url: SplitResult, call: Call, api_key: str | None, timeout_s: float) -> Outcome:
    try:
        return Outcome(url.geturl(), reply=_exchange(url, call, api_key, timeout_s))
    except TimeoutError:
        error = _no_answer(timeout_s)
    except _Refused as refusal:
        error = str(refusal)
    except OSError as failure:
        error = f"cannot reach it: {failure.strerror or failure}"
        if isinstance(failure, SSLError) and not isinstance(failure, SSLCertVerificationError):
            error = f"it does not speak HTTPS ({failure.reason}); is its URL http://{url.netloc}?"
    except (HTTPException, ValueError):
        error = f"it does not speak {url.scheme.upper()} as a Caesura server does"
    return Outcome(url.geturl(), error=error)


def _exchange(url: SplitResult, call: Call, api_key: str | None, timeout_s: float) -> Reply:
    """Raises _Refused, OSError, HTTPException or ValueError."""
    kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
    connection = kind(url.hostname or "", url.port, timeout=timeout_s)
    try:
        headers = {"Content-Type": "application/json"}
        if api_key is not None:
            headers["Authorization"] = f"Bearer {api_key}"
        body = None if call.body is None else json.dumps(call.body)
        path = url.path.rstrip("/") + call.path
        connection.request(call.method, path, body, headers)
        response = connection.getresponse()
        status, data = response.status, response.read()
    finally:
        connection.close()
    return _read_reply(call, path, status, data)


def _read_reply(call: Call, path: str, status: int, data: bytes) -> Reply:
    try:
        reply = json.loads(data)
        error = reply["error"]["message"] if status != 200 else ""
    except (ValueError, LookupError, TypeError):
        reply, error = None, ""
    if status in (401, 403):
        raise _Refused(f"{error or f'it answered {status}'} (--api-key KEY)")
    if status == 200 and isinstance(reply, dict) and call.fields <= reply.keys():
        return reply
    if status in (200, 404, 405) or not error:
        what = f"{call.method} {path} is answered with {status}"
        hint = "" if path == call.path else "; the URL may be right without its path"
        raise _Refused(f"it is no Caesura server that knows this call: {what}{hint}")
    raise _Refused(error)
