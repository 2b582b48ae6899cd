"""Pipeline schedules: which rank runs which action in which order."""

from __future__ import annotations

from .published.classic import breadth_first, gpipe, interleaved_1f1b, one_f_one_b
from .published.library import SCHEDULES, SEARCHED, build_schedule, near_names
from .schedule import PipelineSchedule, loop_placement, v_placement

__all__ = [
    "SCHEDULES",
    "SEARCHED",
    "PipelineSchedule",
    "breadth_first",
    "build_schedule",
    "gpipe",
    "interleaved_1f1b",
    "loop_placement",
    "near_names",
    "one_f_one_b",
    "v_placement",
]
