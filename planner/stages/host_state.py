"""Seconds of optimizer state in host memory, as runtime/host_link.py moves it and runtime/stepping.py steps it.

    each microbatch    gradients that leave early: down the link, added up on the host
    each step          other gradients down the link; their norm and its factor, where that is asked for; the update at
                       the rate of the host's memory; new parameters up the link

On an accelerator the first passes beside the backward, and new parameters of all subgroups but the last beside the
update of those after them. On a CPU nothing hides.
"""

from __future__ import annotations

from ...costmodel.constants import assumed
from ...profiler.device import Device
from ..space.candidates import Candidate
from .setting import Setting


def microbatch_seconds(setting: Setting, elements: float, element_bytes: int, device: Device) -> float:
    """Of gradients that leave early, so many bytes an element on the link."""
    kinds = setting.kinds
    down_s = setting.cost_model.between_host_seconds(elements * element_bytes, device)
    added_s = setting.cost_model.host_memory_seconds(elements * (element_bytes + 2 * kinds.reduce), device)
    return down_s + added_s if device.kind == "cpu" else max(down_s, added_s)


def step_seconds(setting: Setting, candidate: Candidate, elements: float, late: float, device: Device) -> float:
    """After the backward, of elements stepped on one rank; late: of those whose gradients leave at the end."""
    kinds, model, spec = setting.kinds, setting.cost_model, setting.workload.optimizer
    passes = (1 if spec.needs_norm else 0) + (2 if spec.max_grad_norm is not None else 0)
    written = kinds.compute if kinds.single_copy else 0  # counted in moved_by_update otherwise
    moved = elements * (kinds.moved_by_update + written)
    update_s = model.host_memory_seconds(moved, device)
    norm_s = model.host_memory_seconds(elements * passes * kinds.master, device)
    late_bytes = late * kinds.reduce
    down_s = model.between_host_seconds(late_bytes, device) + model.host_memory_seconds(2 * late_bytes, device)
    up_s = model.between_host_seconds(elements * kinds.compute, device)
    if device.kind == "cpu":
        return down_s + norm_s + update_s + up_s
    last = min(1.0, assumed("host_step_elements") / max(elements, 1.0))
    return down_s + norm_s + max(update_s, up_s) + last * min(update_s, up_s)


def optimizer_seconds(setting: Setting, candidate: Candidate, elements: float, late: float, device: Device) -> float:
    """Wherever the candidate has its state."""
    if candidate.on_host:
        return step_seconds(setting, candidate, elements, late, device)
    return setting.optimizer_seconds(elements, device)
