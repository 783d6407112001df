#!/usr/bin/env python3
"""Start engines and let them dial a front end, here or on another machine:

    python scripts/launch.py MODEL --handshake tcp://10.0.0.1:29550 --num-engines 4

Each engine prints a line when it is ready. Ctrl-C ends them all in order; so does the end of this
script, however it comes about. `caesura serve --headless` does the same with vLLM's flags.
"""

from __future__ import annotations

import argparse
import json
import sys

from frontend.config import BUNDLED_MODEL_DIRECTORY
from frontend.engines.headless import run_engines
from frontend.errors import EngineStartupError
from ipc.engine_config import EngineConfig
from ipc.logs import configure_logging
from ipc.sockets import check_address


def main() -> int:
    """Run the script; returns its exit status."""
    parser = argparse.ArgumentParser(description="Start engines that dial a front end.")
    parser.add_argument("model", nargs="?", default=str(BUNDLED_MODEL_DIRECTORY))
    parser.add_argument("--handshake", default="tcp://127.0.0.1:29550", metavar="ADDRESS")
    parser.add_argument("--num-engines", type=int, default=1, metavar="N")
    parser.add_argument("--start-rank", type=int, default=0, metavar="RANK")
    parser.add_argument(
        "--data-parallel-size", type=int, metavar="N", help="engines of the whole deployment"
    )
    parser.add_argument(
        "--config",
        type=_json_object,
        default="{}",
        metavar="JSON",
        help="further fields of ipc.engine_config",
    )
    arguments = parser.parse_args()
    ranks = range(arguments.start_rank, arguments.start_rank + arguments.num_engines)
    try:
        config = EngineConfig.from_json(json.dumps({"model": arguments.model} | arguments.config))
        check_address(arguments.handshake)
        configure_logging("launcher")
        return run_engines(
            config,
            handshake_address=arguments.handshake,
            ranks=ranks,
            data_parallel_size=arguments.data_parallel_size or ranks.stop,
        )
    except (EngineStartupError, TypeError, ValueError) as error:
        print(f"launch.py: error: {error}", file=sys.stderr)
        return 2


def _json_object(text: str) -> dict[str, object]:
    try:
        values = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {error}") from None
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON object")
    return values


if __name__ == "__main__":
    sys.exit(main())
