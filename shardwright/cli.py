"""The command line: parses, hands over to shardwright/commands, and turns every failure into an exit code.

Imports nothing heavy: `shardwright --help` answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from . import __version__
from .commands import COMMANDS
from .commands._stdout import json_only
from .errors import ExitCode, ShardwrightError, near_matches

INTERRUPTED = 130  # 128 + SIGINT, the shell's convention


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are ShardwrightErrors."""

    def error(self, message: str) -> NoReturn:
        means = ""
        if "invalid choice: '" in message:
            word = message.split("invalid choice: '", 1)[1].split("'", 1)[0]
            means = near_matches(word, self._known_words(message))
        elif message.startswith("unrecognized arguments: "):
            word = message.removeprefix("unrecognized arguments: ").partition(" ")[0].partition("=")[0]
            means = near_matches(word, self._option_strings())
        raise ShardwrightError(message, means=means, change="the command line", works=f"{self.prog} --help")

    def _known_words(self, message: str) -> list[str]:
        inside = message.rpartition("(choose from ")[2].rstrip(")")
        return [word.strip().strip("'") for word in inside.split(",")]

    def _option_strings(self) -> list[str]:
        strings: list[str] = []
        for action in self._actions:
            strings += action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    strings += [text for inner in parser._actions for text in inner.option_strings]
        return strings


def make_parser() -> Parser:
    parser = Parser(
        prog="shardwright",
        description="Plan how to split a PyTorch model over a cluster, rewrite it accordingly, and run it.",
        epilog="Exit codes: 0 done, 1 internal error, 2 usage, 3 does not fit, 4 constraints contradict, "
        "5 unsupported model, 6 time limit without a plan, 7 plan does not match, 130 interrupted.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"shardwright {__version__}")
    common = Parser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show tracebacks and the libraries' warnings")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    for command in COMMANDS:
        sub = commands.add_parser(
            command.NAME,
            help=command.HELP,
            description=command.__doc__,
            parents=[common],
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.add_arguments(sub)
        sub.set_defaults(execute=command.execute)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code. Never lets a traceback out without --debug."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    if not debug:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        args = make_parser().parse_args(arguments)
        with json_only() if getattr(args, "json", False) else contextlib.nullcontext():
            code = int(args.execute(args))
        sys.stdout.flush()
        return code
    except ShardwrightError as error:
        if debug:
            traceback.print_exc()
        print_error(error)
        return int(error.exit_code)
    except BrokenPipeError:
        # The reader (head, less) has left. Point stdout elsewhere, or the interpreter complains again when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitCode.DONE)
    except KeyboardInterrupt:
        print("shardwright: interrupted", file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        if debug:
            traceback.print_exc()
        print_error(_explain_os_error(error))
        return int(ExitCode.USAGE if error.filename else ExitCode.INTERNAL)
    except Exception as error:
        if debug:
            traceback.print_exc()
        text = " ".join(str(error).split())
        print(f"shardwright: internal error: {type(error).__name__}: {text[:300]} (run with --debug)", file=sys.stderr)
        return int(ExitCode.INTERNAL)


def _explain_os_error(error: OSError) -> ShardwrightError:
    if error.filename is None:
        return ShardwrightError(
            f"the operating system refused: {error}", means="nothing was written", change="run with --debug"
        )
    return ShardwrightError(
        f"cannot use {error.filename}: {error.strerror}",
        means="the path is missing, or this user may not read or write it",
        change="the path, or its permissions",
    )


def print_error(error: ShardwrightError) -> None:
    """The four parts on stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    labels = ("error", "what it means", "change", "would work")
    styles = ("bold red", "yellow", "cyan", "green")
    parts = (error.what, error.means, error.change, error.works)
    for label, style, part in zip(labels, styles, parts, strict=True):
        if part:
            console.print(Text.assemble((f"{label}: ", style), part))
