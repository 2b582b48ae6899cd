"""Schedules by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import ShardwrightError
from .base import PipelineSchedule
from .classic import gpipe, interleaved_1f1b, one_f_one_b


@dataclass(frozen=True)
class ScheduleEntry:
    """build(num_ranks, num_microbatches, num_chunks). chunks: the numbers of chunks that it takes."""

    name: str
    build: Callable[[int, int, int], PipelineSchedule]
    chunks: range
    citation: str


SCHEDULES: dict[str, ScheduleEntry] = {
    entry.name: entry
    for entry in (
        ScheduleEntry("gpipe", lambda p, m, v: gpipe(p, m, v), range(1, 2), "Huang et al., arXiv:1811.06965"),
        ScheduleEntry("1f1b", lambda p, m, v: one_f_one_b(p, m), range(1, 2), "Narayanan et al., arXiv:2006.09503"),
        ScheduleEntry("interleaved_1f1b", interleaved_1f1b, range(2, 65), "Narayanan et al., arXiv:2104.04473"),
    )
}

_ALIASES = {"interleaved": "interleaved_1f1b", "interleaved-1f1b": "interleaved_1f1b"}


def near_names(name: str) -> list[str]:
    return difflib.get_close_matches(name.lower(), SCHEDULES, n=3, cutoff=0.3)


def canonical_name(name: str) -> str:
    """The library's own name of a schedule. Raises ShardwrightError, with near matches, where there is none."""
    wanted = name.lower().strip()
    wanted = _ALIASES.get(wanted, wanted)
    if wanted not in SCHEDULES:
        near = near_names(wanted)
        raise ShardwrightError(
            f"unknown schedule {name!r}; the library has {', '.join(SCHEDULES)}",
            means="no order of actions goes by that name",
            change="--force schedule=NAME",
            works=f"--force schedule={near[0] if near else '1f1b'}",
        )
    return wanted


def build_schedule(name: str, num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> PipelineSchedule:
    """Raises ShardwrightError where the name is unknown or does not take that number of chunks."""
    entry = SCHEDULES[canonical_name(name)]
    if num_chunks not in entry.chunks:
        low, high = entry.chunks.start, entry.chunks.stop - 1
        span = str(low) if low == high else f"{low} to {high}"
        raise ShardwrightError(
            f"schedule {entry.name} takes {span} virtual stages on a rank, not {num_chunks}",
            change="virtual_stages",
            works=f"virtual_stages={low}",
        )
    return entry.build(num_ranks, num_microbatches, num_chunks)
