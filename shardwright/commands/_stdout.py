"""Under --json nothing but JSON reaches stdout, whoever prints: our code, a user's model, or a library's C code."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from typing import TextIO

STDOUT, STDERR = 1, 2  # file descriptors

_json_stream: TextIO | None = None


@contextlib.contextmanager
def json_only() -> Iterator[None]:
    """print_json() alone writes to what is stdout now; all else that is written there goes to stderr."""
    global _json_stream
    real = sys.stdout
    real.flush()
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(_descriptor_to_stderr())
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        _json_stream = real
        if kept is not None and _descriptor(real) == STDOUT:
            _json_stream = stack.enter_context(os.fdopen(os.dup(kept), "w", encoding=real.encoding))
        try:
            yield
        finally:
            _json_stream = None


@contextlib.contextmanager
def _descriptor_to_stderr() -> Iterator[int | None]:
    """The descriptor of stdout writes to stderr; yields one of what it wrote to, None where it is closed."""
    try:
        kept = os.dup(STDOUT)
    except OSError:
        yield None
        return
    with contextlib.suppress(OSError):  # stderr may be closed
        os.dup2(STDERR, STDOUT)
    try:
        yield kept
    finally:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).fflush(None)  # C code keeps what it wrote in a buffer of its own
        os.dup2(kept, STDOUT)
        os.close(kept)


def _descriptor(stream: TextIO) -> int:
    try:
        return stream.fileno()
    except (OSError, ValueError, AttributeError):  # a test's, or a notebook's
        return -1


def write_json(text: str) -> None:
    print(text, file=_json_stream or sys.stdout, flush=True)
