"""Values that a load began to write and could not: what a program then refuses, until a load succeeds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import ExitCode, ShardwrightError
from .together import of_all_ranks


class HalfLoaded:
    """reason: of the failure; '' where the program is whole."""

    def __init__(self) -> None:
        self.reason = ""

    @contextmanager
    def watched(self) -> Iterator[None]:
        """The block writes values that were verified. Every rank enters it. Where it fails on one all the same, as
        where a file cannot be read for the second time, all raise."""
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # raised below, on every rank
            own = error
        failed = [what for what in of_all_ranks(None if own is None else str(own)) if what is not None]
        self.reason = failed[0].splitlines()[0] if failed else ""
        if failed:
            raise self._error() from own

    def refuse(self) -> None:
        """Before a step, an evaluation or a save. Raises ShardwrightError."""
        if self.reason:
            raise self._error()

    def _error(self) -> ShardwrightError:
        return ShardwrightError(
            f"a load failed after its files were verified: {self.reason}",
            means="some values are the old ones and some are the new; nothing is computed with them or saved",
            change="what failed there, then load again",
            works="program.load of a folder that can be read, or a new program",
            exit_code=ExitCode.INTERNAL,
        )
