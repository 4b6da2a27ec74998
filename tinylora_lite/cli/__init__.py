"""The command line: ``tinylora COMMAND``, one module a command, imported when the command is called.

Exit code 0 only on success. An error is one line on stderr: 1 if the work failed, 2 if the command line was wrong,
130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from tinylora_lite import __version__

COMMANDS = {
    "demo": ("demo", "train 13 parameters on a small model and see what they change"),
    "count": ("count", "count the parameters that a method trains on a model"),
    "plan": ("plan", "find the settings that spend a budget of parameters"),
    "models": ("models", "list the bases that have a name here"),
    "preset": ("preset", "list the presets, or print one as a settings file"),
    "plan-run": ("plan_run", "estimate the memory and time of a run"),
    "calibrate": ("calibrate", "make a basis of directions from policy gradients"),
    "serve": ("serve", "start the vLLM server that a settings file asks for"),
    "check-sampler": ("check_sampler", "find out whether an engine answers with the adapter or with the base"),
    "train": ("train", "train by a settings file, and measure what it changed"),
    "eval": ("evaluate", "score a model and an adapter on test problems"),
    "export": ("export", "write an adapter as a LoRA, in GGUF too, as PEFT's TinyLoRA, or as a merged checkpoint"),
    "inspect": ("inspect", "describe an adapter file, and what a merge would make of it"),
    "lab": ("lab", "test the paper's claims in miniature: list, run, draw, table"),
}
"""Of each command: its module here, and its line of ``tinylora --help``."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} ({self.prog} --help says what it takes)\n")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of the command line; only the module of ``command`` is imported, and only its arguments are known."""
    parser = _Parser(
        prog="tinylora",
        description="Adapt a language model with a handful of parameters.",
        epilog="example: tinylora demo",
    )
    parser.add_argument("--version", action="version", version=f"tinylora {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (file, summary) in COMMANDS.items():
        part = commands.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == command:
            module = importlib.import_module(f"{__name__}.{file}")
            part.description, part.epilog = module.__doc__, f"example:\n  {module.EXAMPLE}"
            module.add_arguments(part)
            seed = getattr(module, "SEED_HELP", "taken by every command; nothing here depends on it")
            part.add_argument("--seed", type=_seed, default=0, help=f"{seed} (default: 0)")
            part.add_argument("--json", action="store_true", help="print one JSON object, as the last line of stdout")
            part.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. Wrong usage, ``--help`` and ``--version`` raise ``SystemExit``."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a replaced one may be anything that has write()
            stream.reconfigure(errors="replace")  # a terminal that lacks a character must not end a run
    words = sys.argv[1:] if argv is None else argv
    command = next((word for word in words if not word.startswith("-")), None)
    try:
        arguments = build_parser(command).parse_args(words, argparse.Namespace(words=words))
        arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"tinylora {command}: stopped before the end", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader, for example `head`, is gone; without this Python would report the same again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        print(f"tinylora {command}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _seed(text: str) -> int:
    if not (text.isdecimal() and int(text) < 2**32):
        raise argparse.ArgumentTypeError(f"a seed is an integer from 0 to {2**32 - 1}, not {text}")
    return int(text)
