"""Runs a command in this process, and says what is wrong with its answer."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from typing import TextIO

from shardwright import cli
from shardwright.errors import ExitCode

EXPECTED = {ExitCode.DONE, *list(ExitCode)[2:]}  # every code but that of an internal error


class Hang(BaseException):
    """Not an Exception: what catches those must not swallow it."""


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Hang(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _captured() -> Iterator[tuple[TextIO, TextIO]]:
    """Files that hold what is written to stdout and stderr, by Python or by a library's C code."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err, contextlib.ExitStack() as stack:
        for number, file in ((1, out), (2, err)):
            kept = os.dup(number)
            stack.callback(os.close, kept)
            stack.callback(os.dup2, kept, number)
            os.dup2(file.fileno(), number)
        writers = [stack.enter_context(os.fdopen(os.dup(number), "w")) for number in (1, 2)]
        stack.enter_context(contextlib.redirect_stdout(writers[0]))
        stack.enter_context(contextlib.redirect_stderr(writers[1]))
        yield out, err
        sys.stdout.flush()
        sys.stderr.flush()


def run(line: list[str], limit_s: float = 120.0) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of a command, in this process."""
    with _captured() as files, limit(limit_s):
        try:
            code = cli.main(line)
        except SystemExit as end:  # argparse's --help and --version
            code = end.code if isinstance(end.code, int) else 2
        except Hang as hang:
            code = -1
            print(hang, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read())
    return code, texts[0], texts[1]


def complaint(line: list[str], code: int, out: str, err: str) -> str:
    """Why an answer is not one that a user may get; '' where it is."""
    if code not in EXPECTED:
        return f"exit code {code}: {err[-300:]}"
    if ("Traceback" in err and "--debug" not in line) or "internal error" in err:
        return err[-300:]
    if code and "--debug" not in line and not err.startswith(("error: ", "importing ")):
        return f"no error is told: {err[:200]!r}"
    asked = {"--help", "-h", "--version"}
    if "--json" in line and not asked & set(line):
        texts = out.splitlines() if line[0] == "run" else [out] * (code == 0)
        try:
            [json.loads(text) for text in texts]
        except ValueError:
            return f"stdout is not JSON: {out[:200]!r}"
        if code and out and line[0] != "run":
            return f"stdout holds something beside an error: {out[:200]!r}"
    return ""
