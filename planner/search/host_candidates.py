"""Candidates with the optimizer's state in host memory: which of them are worth a look.

Such a plan steps more slowly than the same with its state on the device, and has more room. So it can win only where
memory keeps the latter from its best, or from fitting at all. These alone are looked at, after all others, so that
their bounds stand against the best plan without.
"""

from __future__ import annotations

from dataclasses import replace

from ..space.candidates import Candidate
from ..stages.setting import Setting
from .state import SearchState


def may_use_host(setting: Setting) -> bool:
    """Is there other memory than the devices', of known size, and anything to step there? What spans several elements
    is stepped on the device, where ranks can talk."""
    spec, cluster = setting.workload.optimizer, setting.cluster
    devices = [group.device for group in cluster.groups]
    return (
        all(device.kind != "cpu" and device.host_memory_bytes > 0 for device in devices)
        and (spec.is_elementwise or cluster.num_devices == 1)
        and any(trains for _, _, trains in setting.graph.params.values())
    )


def host_candidates(state: SearchState) -> list[Candidate]:
    """Of those that were looked at with their state on the device."""
    if state.forced.optimizer_state is not None or not may_use_host(state.setting):
        return []
    found = []
    for candidate in state.candidates:
        outcome = state.outcomes.get(candidate)
        if outcome is not None and not outcome.unsharded and (outcome.fits is False or outcome.tight):
            found.append(replace(candidate, optimizer_state="host"))
    return found
