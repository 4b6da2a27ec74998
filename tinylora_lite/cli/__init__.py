"""The command line: ``tinylora demo | count | plan | train | eval | export | inspect | lab`` and what they need.

Exit code 0 only on success. An error is one line on stderr: 1 where the work failed, 2 where the command line was
wrong, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from tinylora_lite import __version__
from tinylora_lite.cli import (
    calibrate,
    count,
    demo,
    evaluate,
    export,
    inspect,
    lab,
    plan,
    plan_run,
    preset,
    serve,
    train,
)

COMMANDS = {
    "demo": demo,
    "count": count,
    "plan": plan,
    "preset": preset,
    "plan-run": plan_run,
    "calibrate": calibrate,
    "serve": serve,
    "train": train,
    "eval": evaluate,
    "export": export,
    "inspect": inspect,
    "lab": lab,
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help says what it takes)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; each command adds its own part."""
    parser = _Parser(
        prog="tinylora",
        description="Adapt a language model with a handful of numbers.",
        epilog="example: tinylora demo",
    )
    parser.add_argument("--version", action="version", version=f"tinylora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        command = commands.add_parser(
            name,
            help=module.HELP,
            description=module.__doc__,
            epilog=f"example:\n  {module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(command)
        command.add_argument("--seed", type=_seed, default=0, help=f"{module.SEED_HELP} (default: 0)")
        command.add_argument("--json", action="store_true", help="print one JSON object, as the last line of stdout")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Wrong usage, ``--help`` and ``--version`` raise ``SystemExit``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # where they were replaced, they may be anything that has write()
            stream.reconfigure(errors="replace")  # a terminal without a curve's characters is no reason to lose a run
    arguments = build_parser().parse_args(argv)
    try:
        COMMANDS[arguments.command].run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"tinylora {arguments.command}: stopped before the end", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, `head` for one, has left; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        print(f"tinylora {arguments.command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _seed(text: str) -> int:
    seed = int(text)
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"a seed is a whole number from 0 to {2**32 - 1}, not {text}")
    return seed
