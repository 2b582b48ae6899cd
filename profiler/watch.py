"""What holds over code that takes long and knows nothing of it: a time limit, and who is told of its progress."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar

AGAIN_S = 5.0  # until it is struck again, should somebody have swallowed the first

_listener: ContextVar[Callable[[str], None] | None] = ContextVar("progress", default=None)


class TimeUp(BaseException):
    """Time is up. No Exception: nothing on its way may take it for an error of its own, just as with Ctrl-C."""


@contextlib.contextmanager
def stop_at(deadline: float) -> Iterator[None]:
    """TimeUp is raised in this thread once time.monotonic() passes the deadline; infinity: never. A call into C code
    ends first."""
    if deadline == float("inf"):
        yield
        return
    if time.monotonic() >= deadline:
        raise TimeUp
    target, over = ctypes.c_ulong(threading.get_ident()), threading.Event()
    lock = threading.Lock()

    def watch() -> None:
        wait_s = deadline - time.monotonic()
        while not over.wait(max(wait_s, 0.0)):
            with lock:
                if over.is_set():
                    return
                ctypes.pythonapi.PyThreadState_SetAsyncExc(target, ctypes.py_object(TimeUp))
            wait_s = AGAIN_S

    thread = threading.Thread(target=watch, daemon=True, name="time limit")
    try:  # a limit that is all but over strikes while the thread starts
        thread.start()
        yield
    finally:
        try:
            over.set()
            with lock:  # it does not strike just now
                pass
        finally:  # a last strike is felt here at the latest
            over.set()
            if thread.ident is not None:
                thread.join()


@contextlib.contextmanager
def telling(listener: Callable[[str], None] | None) -> Iterator[None]:
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def tell(message: str) -> None:
    """To whoever listens."""
    listener = _listener.get()
    if listener is not None:
        listener(message)
