"""What the command lines of these benchmarks have in common."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import NoReturn

from scripts.perf_bench.models import BUNDLED_SHAPE, SHAPES, model_directory


class Parser(argparse.ArgumentParser):
    """Tells of an error in one line, and ends with status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def make_parser(description: str | None) -> Parser:
    """With the flags that say what model is measured and where figures go.

    From here on SIGTERM ends the program in order, and so what it has started.
    """
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default=BUNDLED_SHAPE,
        help=f"a directory, {BUNDLED_SHAPE} (the bundled model, the default), or a shape that gets "
        f"random weights: {', '.join(SHAPES)}",
    )
    parser.add_argument("--model-dir", type=Path, help="of random weights (/tmp/models/SHAPE)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


def find_model(parser: Parser, arguments: argparse.Namespace) -> Path:
    """The model's directory, written if it is a shape that is not there yet."""
    try:
        return model_directory(arguments.model, arguments.model_dir)
    except ValueError as error:
        parser.error(str(error))
