"""The one exception class for users' mistakes, and the exit codes of the command line.

Open to every folder; imports nothing of the package.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from enum import IntEnum


class ExitCode(IntEnum):
    """What the command line returns to the shell."""

    DONE = 0
    INTERNAL = 1
    USAGE = 2
    DOES_NOT_FIT = 3
    CONTRADICTION = 4
    UNSUPPORTED_MODEL = 5
    TIME_LIMIT = 6
    PLAN_MISMATCH = 7


class ShardwrightError(ValueError):
    """A mistake that the user can mend, said in four parts.

    what: what happened, with the numbers. means: what that means. change: the exact setting to change. works: a value
    of that setting that would work.
    """

    def __init__(
        self, what: str, *, means: str = "", change: str = "", works: str = "", exit_code: ExitCode = ExitCode.USAGE
    ) -> None:
        self.what, self.means, self.change, self.works, self.exit_code = what, means, change, works, exit_code
        super().__init__("\n".join(self.lines()))

    def lines(self) -> list[str]:
        parts = (
            ("", self.what),
            ("what it means: ", self.means),
            ("change: ", self.change),
            ("would work: ", self.works),
        )
        return [label + text for label, text in parts if text]


def first_line(error: BaseException) -> str:
    """What an error of anybody's code says, to be said in one of ours; its type where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def near_matches(word: str, known: Iterable[str]) -> str:
    """'did you mean a or b?' for the known words nearest to this one; '' where none is near."""
    lowered = {name.lower(): name for name in known}
    found = [lowered[name] for name in difflib.get_close_matches(word.lower(), list(lowered), n=3, cutoff=0.6)]
    return f"did you mean {' or '.join(found)}?" if found else ""
