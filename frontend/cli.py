"""The command line: `caesura serve [MODEL]`. Flags carry vLLM's names where vLLM has them.

Whatever a user can cause is answered with one line. The status is 2 for a wrong flag or value, 1
for a failed start, 130 where Ctrl-C cut a start or a shutdown short; a server that was asked to
end and did ends with 0.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.metadata
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from frontend.config import BUNDLED_MODEL_DIRECTORY, FrontendConfig, HttpConfig
from frontend.errors import EngineStartupError
from ipc.engine_config import EngineConfig
from ipc.logs import configure_logging

_PROGRAM = "caesura"
_INTERRUPTED_STATUS = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's own). Returns the exit status."""
    parser = _make_parser()
    parsed = vars(parser.parse_args(arguments))
    try:
        config = _make(FrontendConfig, parsed, engine=_make(EngineConfig, parsed))
        http = _make(HttpConfig, parsed)
        configure_logging("launcher" if parsed["headless"] else "frontend")
    except ValueError as error:
        parser.error(str(error))
    try:
        return _run_headless(config) if parsed["headless"] else _run_server(config, http)
    except (EngineStartupError, OSError, ValueError) as error:
        print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED_STATUS


def _run_server(config: FrontendConfig, http: HttpConfig) -> int:
    # Imported only here, so that a wrong flag is told without delay.
    import uvloop

    from frontend.serving import serve

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, http))
    return 0


def _run_headless(config: FrontendConfig) -> int:
    from frontend.headless import run_engines

    return run_engines(
        config.engine,
        handshake_address=config.handshake_tcp_address,
        ranks=config.local_ranks,
        data_parallel_size=config.data_parallel_size,
    )


def _make[T](kind: type[T], parsed: dict[str, Any], **others: object) -> T:
    """A configuration of `kind` from the flags that were given; the others keep its defaults."""
    return None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROGRAM, description="An LLM serving engine.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {_version()}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP, with OpenAI's API.",
        # A flag that is not given leaves its configuration's default alone.
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
