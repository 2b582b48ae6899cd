"""Values that a load began to write and could not: what a program then refuses, until all of them are written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ..errors import ExitCode, ShardwrightError
from .together import of_all_ranks


class HalfLoaded:
    """reason: of the failure; '' where the program is whole."""

    def __init__(self) -> None:
        self.reason = ""
        self._doubtful: set[str] = set()  # of this rank's values

    @contextmanager
    def watched(self, keys: Iterable[str]) -> Iterator[None]:
        """The block writes values that were verified. Every rank enters it. Where it fails on one all the same, as
        where a file cannot be read for the second time, all raise.

        keys: those of state_dict() that it writes. What an earlier load left half written is whole again once a block
        succeeds that writes all of it on every rank: weights alone do not mend optimizer state.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:  # raised below, on every rank
            own = error
        left = self._doubtful - set(keys)
        everyone = of_all_ranks((None if own is None else str(own) or type(own).__name__, bool(left)))
        failed = [what for what, _ in everyone if what is not None]
        if failed:
            self._doubtful |= set(keys)
            self.reason = failed[0].splitlines()[0]
            raise self._error() from own
        self._doubtful = left
        if not any(is_left for _, is_left in everyone):
            self.reason = ""

    def refuse(self) -> None:
        """Before a step, an evaluation, a save or a state dictionary. Raises ShardwrightError."""
        if self.reason:
            raise self._error()

    def _error(self) -> ShardwrightError:
        return ShardwrightError(
            f"a load failed after its files were verified: {self.reason}",
            means="some values are the old ones and some are the new; nothing is computed with them or saved",
            change="what failed there, then load again",
            works="program.load of a whole checkpoint that can be read, or a new program",
            exit_code=ExitCode.INTERNAL,
        )
