"""The engine process's command line: `python -P -m engine_core --handshake ADDRESS --config JSON`.

Users rarely type it; launchers do. What a user can cause is answered with one line and exit status
2, other failures with a traceback and status 1.
"""

from __future__ import annotations

import argparse
import signal
import sys
from typing import NoReturn

from engine_core.process.launcher_watch import LauncherWatch
from ipc.engine_config import SETUP_ERROR_PREFIX, EngineConfig
from ipc.handshake import MAX_RANK
from ipc.logs import configure_logging


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _rank(text: str) -> int:
    rank = int(text)
    if not 0 <= rank <= MAX_RANK:
        raise argparse.ArgumentTypeError(f"{rank} is no rank; choose 0 to {MAX_RANK}")
    return rank


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _config(text: str) -> EngineConfig:
    try:
        return EngineConfig.from_json(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Options of an engine process. Prints one line and exits with status 2 if one is wrong."""
    parser = _Parser(
        prog="engine_core",
        description="One Caesura engine, serving the front end at the given address.",
    )
    parser.add_argument(
        "--handshake", required=True, metavar="ADDRESS", help="where the front end listens"
    )
    parser.add_argument("--rank", type=_rank, default=0, help="this engine's number (default 0)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--local", action="store_true", help="started by the front end itself")
    where.add_argument("--headless", action="store_true", help="started by others (default)")
    parser.add_argument(
        "--config", type=_config, required=True, metavar="JSON", help="an EngineConfig"
    )
    parser.add_argument(
        "--num-local-engines", type=_positive, default=1, help="engines that share this machine"
    )
    parser.add_argument(
        "--data-parallel-size", type=_positive, default=1, help="engines of the whole deployment"
    )
    parser.add_argument(
        "--die-with-stdin",
        action="store_true",
        help="end when stdin does, as it does with a launcher",
    )
    return parser.parse_args(arguments)


def main() -> int:
    """Run an engine; returns its exit status."""
    # Until it serves, an engine has nothing to end in order: Ctrl-C ends it at once, like SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parsed = parse_arguments(sys.argv[1:])
    try:
        configure_logging(f"engine {parsed.rank}")
    except ValueError as error:
        return _fail(error)
    launcher_watch = LauncherWatch() if parsed.die_with_stdin else None
    # Imported only now: a launcher may be killed while this takes its time.
    from engine_core.process.run import EngineOptions, SetupError, run_engine

    options = EngineOptions(
        handshake_address=parsed.handshake,
        rank=parsed.rank,
        local=parsed.local,
        config=parsed.config,
        num_local_engines=parsed.num_local_engines,
        data_parallel_size=parsed.data_parallel_size,
    )
    try:
        return run_engine(options, launcher_watch)
    except SetupError as error:
        return _fail(error)


def _fail(error: Exception) -> int:
    print(f"{SETUP_ERROR_PREFIX}{error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
