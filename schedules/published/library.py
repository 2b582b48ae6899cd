"""Schedules by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from ...errors import ShardwrightError
from ..schedule import PipelineSchedule
from .classic import breadth_first, gpipe, interleaved_1f1b, one_f_one_b
from .dual_pipe import dualpipe_v
from .v_blocks import v_schedule
from .waves import bitpipe, chimera, hanayo
from .zero_bubble import two_bp, zb_h1, zb_h2


@dataclass(frozen=True)
class ScheduleEntry:
    """build(num_ranks, num_microbatches, num_chunks). chunks: the numbers of chunks that it takes, the usual one first.

    directions: 2 where every rank holds the stages of a second pipeline of the opposite direction.
    """

    name: str
    build: Callable[[int, int, int], PipelineSchedule]
    chunks: Sequence[int]
    citation: str
    splits_backward: bool = False
    directions: int = 1


def _v(name: str) -> Callable[[int, int, int], PipelineSchedule]:
    return lambda p, m, v: v_schedule(name, p, m)


_ONE, _TWO, _EVEN = (1,), (2,), range(2, 65, 2)
_MORE = (2, 1, *range(3, 65))  # with one chunk 1F1B and GPipe

SCHEDULES: dict[str, ScheduleEntry] = {
    entry.name: entry
    for entry in (
        ScheduleEntry("gpipe", lambda p, m, v: gpipe(p, m, v), _ONE, "Huang et al., arXiv:1811.06965"),
        ScheduleEntry("1f1b", lambda p, m, v: one_f_one_b(p, m), _ONE, "Narayanan et al., arXiv:2006.09503"),
        ScheduleEntry("interleaved_1f1b", interleaved_1f1b, _MORE, "Narayanan et al., arXiv:2104.04473"),
        ScheduleEntry("breadth_first", breadth_first, _MORE, "Lamy-Poirier, arXiv:2211.05953"),
        ScheduleEntry("zb_h1", lambda p, m, v: zb_h1(p, m), _ONE, "Qi et al., arXiv:2401.10241", True),
        ScheduleEntry("zb_h2", lambda p, m, v: zb_h2(p, m), _ONE, "Qi et al., arXiv:2401.10241", True),
        ScheduleEntry("zb_v", _v("zb_v"), _TWO, "Qi et al., arXiv:2401.10241", True),
        ScheduleEntry("v_half", _v("v_half"), _TWO, "Qi et al., arXiv:2405.15362", True),
        ScheduleEntry("v_min", _v("v_min"), _TWO, "Qi et al., arXiv:2405.15362", True),
        ScheduleEntry("dualpipe_v", lambda p, m, v: dualpipe_v(p, m), _TWO, "DeepSeek-AI, arXiv:2412.19437", True),
        ScheduleEntry("hanayo", hanayo, _EVEN, "Liu et al., arXiv:2308.15762"),
        ScheduleEntry("chimera", lambda p, m, v: chimera(p, m), _ONE, "Li and Hoefler, arXiv:2107.06925", False, 2),
        ScheduleEntry("bitpipe", lambda p, m, v: bitpipe(p, m), _TWO, "Wu et al., arXiv:2410.19367", False, 2),
    )
}


def _two_bp(entry: ScheduleEntry) -> ScheduleEntry:
    def build(num_ranks: int, num_microbatches: int, num_chunks: int) -> PipelineSchedule:
        return two_bp(entry.build(num_ranks, num_microbatches, num_chunks))

    citation = f"Rae et al., arXiv:2405.18047, of {entry.name}"
    return replace(entry, name=f"{entry.name}_2bp", build=build, citation=citation, splits_backward=True)


_whole = [entry for entry in SCHEDULES.values() if not entry.splits_backward]
SCHEDULES |= {entry.name: entry for entry in map(_two_bp, _whole)}
SEARCHED = ("gpipe", "1f1b", "interleaved_1f1b")  # what the outer search chooses from

_ALIASES = {"interleaved": "interleaved_1f1b", "zbv": "zb_v", "zb1p": "zb_h1", "dualpipev": "dualpipe_v",
            "two_bp": "1f1b_2bp", "2bp": "1f1b_2bp", "interleaved_2bp": "interleaved_1f1b_2bp"}  # fmt: skip


def near_names(name: str) -> list[str]:
    return difflib.get_close_matches(name.lower(), SCHEDULES, n=3, cutoff=0.3)


def canonical_name(name: str, among: Collection[str] = tuple(SCHEDULES), option: str = "--force schedule=") -> str:
    """The library's own name of a schedule. Raises ShardwrightError, with near matches, where there is none.

    option: how the user says it.
    """
    wanted = name.lower().strip().replace("-", "_")
    wanted = _ALIASES.get(wanted, wanted)
    if wanted not in among:
        near = [match for match in near_names(wanted) if match in among]
        raise ShardwrightError(
            f"unknown schedule {name!r}; there are {', '.join(among)}",
            means="no order of actions goes by that name here",
            change=f"{option}NAME",
            works=f"{option}{near[0] if near else '1f1b'}",
        )
    return wanted


def build_schedule(name: str, num_ranks: int, num_microbatches: int, num_chunks: int = 1) -> PipelineSchedule:
    """Raises ShardwrightError where the name is unknown or does not take that number of chunks."""
    entry = SCHEDULES[canonical_name(name)]
    if num_chunks not in entry.chunks:
        low, high = min(entry.chunks), max(entry.chunks)
        span = str(low) if low == high else f"{low} to {high}"
        raise ShardwrightError(
            f"schedule {entry.name} takes {span} virtual stages on a rank, not {num_chunks}",
            change="virtual_stages",
            works=f"virtual_stages={low}",
        )
    return entry.build(num_ranks, num_microbatches, num_chunks)
