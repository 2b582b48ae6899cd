"""Does a candidate fit: in the memory of its devices, and in their shares of their hosts where its state is there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ...costmodel.constants import assumed
from ...costmodel.memory import usable_bytes
from ..space.candidates import Candidate
from ..stages.chain import Chain
from ..stages.setting import Setting
from .rank_bytes import quick_peaks, stages_by_rank, state_memory_of


class HostNeed(NamedTuple):
    """limit_bytes: 0 where the host's memory is not known; it then holds anything."""

    rank: int
    needed_bytes: int
    limit_bytes: int

    @property
    def missing_bytes(self) -> int:
        return max(0, self.needed_bytes - self.limit_bytes) if self.limit_bytes else 0


def host_need(setting: Setting, candidate: Candidate, chain: Chain, bounds: Sequence[int], rank: int) -> HostNeed:
    """Of one pipeline rank."""
    device = setting.mesh(candidate).devices[rank]
    limit = usable_bytes(device.host_memory_bytes)
    if not candidate.on_host:
        return HostNeed(rank, 0, limit)
    chunks = stages_by_rank(candidate.schedule, candidate.pp, candidate.virtual_stages)[:, rank].tolist()
    states = [chain.stage_state(bounds[stage], bounds[stage + 1]) for stage in sorted(set(chunks))]
    held = sum(int(state_memory_of(setting, candidate, state, device.kind).host) for state in states)
    return HostNeed(rank, held + round(assumed("host_link_bytes", device.kind)), limit)


def worst_host_need(setting: Setting, candidate: Candidate, chain: Chain, bounds: Sequence[int]) -> HostNeed:
    """The rank that misses most, or needs most where none misses any."""
    needs = [host_need(setting, candidate, chain, bounds, rank) for rank in range(candidate.pp)]
    return max(needs, key=lambda need: (need.missing_bytes, need.needed_bytes))


def fits(setting: Setting, candidate: Candidate, chain: Chain, bounds: Sequence[int]) -> bool:
    if not (quick_peaks(setting, candidate, chain, bounds) <= setting.limits(candidate)).all():
        return False
    return not candidate.on_host or not worst_host_need(setting, candidate, chain, bounds).missing_bytes
