"""The command line: `caesura serve [MODEL]`, and the commands that control servers. Flags of
`serve` carry vLLM's names where vLLM has them.

Whatever a user can cause is answered with one line. The status is 2 for a wrong flag or value, 1
for a failed start, 130 where further Ctrl-Cs cut a shutdown short or the first came too early for
one; a server that was asked to end and did ends with 0.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from frontend import control_cli
from frontend.cli_hints import unknown_flags
from frontend.config import BUNDLED_MODEL_DIRECTORY, FrontendConfig, HttpConfig
from frontend.errors import EngineStartupError
from frontend.version import version
from ipc.engine_config import EngineConfig
from ipc.logs import FORMAT_VARIABLE, LOG_FORMATS, configure_logging

_PROGRAM = "caesura"
_INTERRUPTED_STATUS = 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: the process's own). Returns the exit status."""
    parser = _make_parser()
    parsed = parser.parse_args(arguments)
    try:
        return control_cli.run(parsed) if "make_command" in parsed else _serve(vars(parsed))
    except KeyboardInterrupt:
        return _INTERRUPTED_STATUS


def _serve(flags: dict[str, Any]) -> int:
    flags.setdefault("model", str(BUNDLED_MODEL_DIRECTORY))
    try:
        engine = EngineConfig(**_fields_of(EngineConfig, flags))
        config = FrontendConfig(engine=engine, **_fields_of(FrontendConfig, flags))
        http = HttpConfig(**_fields_of(HttpConfig, flags))
        if "log_format" in flags:
            os.environ[FORMAT_VARIABLE] = flags["log_format"]  # For the engines too.
        configure_logging("launcher" if "headless" in flags else "frontend")
    except ValueError as error:
        return _fail(error, status=2)
    try:
        return _run_headless(config) if "headless" in flags else _run_server(config, http)
    except (EngineStartupError, OSError, ValueError) as error:
        return _fail(error, status=1)


def _fail(error: Exception, *, status: int) -> int:
    print(f"{_PROGRAM}: error: {error}", file=sys.stderr)
    return status


def _run_server(config: FrontendConfig, http: HttpConfig) -> int:
    # Imported only here, so that a wrong flag is told without delay.
    import asyncio

    import uvloop

    from frontend.http.serving import serve

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(config, http))
    return 0


def _run_headless(config: FrontendConfig) -> int:
    from frontend.engines.headless import run_engines

    return run_engines(
        config.engine,
        handshake_address=config.handshake_tcp_address,
        ranks=config.local_ranks,
        data_parallel_size=config.data_parallel_size,
    )


def _fields_of(kind: type, flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given and that `kind` has fields for; the rest keeps its defaults."""
    names = {field.name for field in dataclasses.fields(kind)}
    return {name: value for name, value in flags.items() if name in names}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


class _CommandParser(_Parser):
    """Tells of a flag that it does not know itself, with its own help."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(unknown_flags(unknown, self._option_string_actions))
        return parsed, unknown


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog=_PROGRAM, description="An LLM serving engine.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {version()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    serve = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model over HTTP, with OpenAI's API.",
        # A flag that is not given leaves the default to its configuration.
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    serve.add_argument(
        "model", nargs="?", metavar="MODEL", help="directory or hub id (default: the bundled model)"
    )
    _add_http_flags(serve.add_argument_group("HTTP server"))
    _add_admission_flags(serve.add_argument_group("overload (refused with 503)"))
    _add_log_flags(serve.add_argument_group("logs"))
    _add_engine_flags(serve.add_argument_group("each engine"))
    _add_deployment_flags(serve.add_argument_group("several engines"))
    control_cli.add_commands(commands)
    return parser


def _add_http_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--host", help="address to listen on (default 127.0.0.1)")
    group.add_argument("--port", type=int, help="port to listen on, 0 for any (default 8000)")
    group.add_argument("--uds", metavar="PATH", help="listen on a Unix socket instead")
    group.add_argument("--api-key", metavar="KEY", help="demand this key of clients")
    group.add_argument(
        "--admin-api-key", metavar="KEY", help="demand this one for control (default: --api-key)"
    )
    group.add_argument(
        "--served-model-name", metavar="NAME", help="the model's name in the API (default MODEL)"
    )
    for flag, what in (
        ("--stream-interval", "tokens per delivery (default 1)"),
        ("--max-body-bytes", "longest body of a request (default 64 MiB)"),
        ("--max-connections", "open connections (default 16384)"),
        ("--max-unread-tokens", "tokens that a slow reader may leave unread (default 4096)"),
    ):
        group.add_argument(flag, type=int, metavar="N", help=what)
    group.add_argument(
        "--shutdown-timeout",
        dest="shutdown_timeout_s",
        type=float,
        metavar="S",
        help="seconds that requests may still run at a shutdown (default 30)",
    )
    group.add_argument(
        "--strict-selectors",
        action="store_true",
        help="refuse an abort without a selector, which vLLM's API takes for all requests",
    )
    group.add_argument(
        "--hold-while-paused",
        action="store_true",
        help="hold newcomers during every pause of vLLM's API (default: it refuses some)",
    )


def _add_admission_flags(group: argparse._ArgumentGroup) -> None:
    for flag, what in (
        ("--max-num-queued-requests", "requests that may wait for their first token"),
        ("--max-num-queued-tokens", "prompt tokens that these may have together"),
    ):
        group.add_argument(flag, type=int, metavar="N", help=f"{what} (default: no limit)")


def _add_log_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--log-format", choices=LOG_FORMATS, help="a line's form (default text)")
    group.add_argument("--log-requests", action="store_true", help="log each request's end")


def _add_engine_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--device", help="auto, cpu or cuda (default auto)")
    group.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default auto)")
    group.add_argument(
        "--quantization", help="int8: weights as 8-bit integers (CPU; default: as they are stored)"
    )
    for flag, what in (
        ("--max-model-len", "longest prompt plus output, in tokens (default: the model's)"),
        ("--max-num-seqs", "sequences running at once (default 256)"),
        ("--max-num-batched-tokens", "tokens of one step (default 2048)"),
        ("--block-size", "tokens of a KV block (default 32)"),
        ("--kv-cache-memory-bytes", "size of the KV cache (default: from the free memory)"),
        ("--num-gpu-blocks-override", "exact number of KV blocks, on any device"),
        ("--num-threads", "compute threads on a CPU (default: the cores, shared out)"),
        ("--seed", "seed for requests that bring none (default 0)"),
    ):
        group.add_argument(flag, type=int, metavar="N", help=what)
    group.add_argument(
        "--enable-prefix-caching",
        action=argparse.BooleanOptionalAction,
        help="reuse the KV of common prefixes (default on)",
    )
    group.add_argument(
        "--deterministic",
        action="store_true",
        help="insist that results do not depend on what is computed together (CPU)",
    )
    group.add_argument("--runner", help="model, or fake for load tests without one (default model)")
    group.add_argument(
        "--fake-step-time-ms", type=float, metavar="MS", help="duration of a fake step (default 0)"
    )


def _add_deployment_flags(group: argparse._ArgumentGroup) -> None:
    for flag, what in (
        ("--data-parallel-size", "engines in all (default 1)"),
        ("--data-parallel-size-local", "engines that are started here (default: all)"),
        ("--data-parallel-start-rank", "rank of the first one started here (default 0)"),
        ("--data-parallel-rpc-port", "port of the handshake with engines (default 29550)"),
    ):
        group.add_argument(flag, type=int, metavar="N", help=what)
    group.add_argument(
        "--data-parallel-address", metavar="HOST", help="its host (default 127.0.0.1)"
    )
    group.add_argument(
        "--headless", action="store_true", help="start engines only; they dial that host and port"
    )


if __name__ == "__main__":
    sys.exit(main())
