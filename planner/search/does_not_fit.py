"""Nothing fits: how many GiB are missing on which rank, and the nearest change that fits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from ...errors import ExitCode, ShardwrightError
from ...plans.axes import MeshShape, names, searched_axes, tensor_axes
from ...profiler.accelerators import accelerators
from ...profiler.cluster import Cluster
from ...profiler.hardware import parse_hardware
from ...units import GIB, format_bytes
from ..interfaces import ShardingSolution
from ..memory.limits import fits
from ..memory.rank_bytes import rank_breakdown
from ..space.candidates import Candidate, enumerate_candidates, force_text
from ..space.choices import Choices
from ..stages.chain import NOTHING, leanest_segments
from ..stages.setting import Setting
from .host_candidates import may_use_host
from .outcome import Outcome
from .smaller_job import Known, smaller_jobs
from .state import SearchState
from .step_time import find_cuts

Solutions = Mapping[tuple[MeshShape, int], ShardingSolution | None]
Solve = Callable[[MeshShape, int], ShardingSolution | None]  # mesh of a stage, local batch

# Most candidates looked at for one change.
MAX_TRIES = 120
FACTORS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
WIDER = (2, 8)


class DoesNotFit(ShardwrightError):
    """Nothing fits. memory: bytes of the worst rank of the nearest candidate, by kind; they sum to peak_bytes.
    kept_free_bytes: beyond limit_bytes, left to the prediction's error, which was no larger in memory_sure of runs."""

    kept_free_bytes: int = 0
    memory_sure: float = 0.0

    def __init__(self, what: str, nearest: Outcome, memory: Mapping[str, int], **parts: Any) -> None:
        super().__init__(what, exit_code=ExitCode.DOES_NOT_FIT, **parts)
        self.nearest, self.memory = nearest, dict(memory)
        self.peak_bytes = sum(memory.values()) or nearest.peak_bytes or 0
        self.limit_bytes = nearest.limit_bytes


def does_not_fit(state: SearchState) -> ShardwrightError:
    """The error to raise (exit 3). Solutions found stand in for those of other meshes with the same tensor axis."""
    setting, forced, outcomes = state.setting, state.forced, list(state.outcomes.values())
    tried = [outcome for outcome in outcomes if outcome.fits is False]
    if not tried:
        return ShardwrightError(
            "no tensor axis can shard this model over these devices",
            means=f"{len(outcomes)} candidates, all without a sharding",
            change=f"--force {tensor_axes()[-1]}",
            works=f"--force {tensor_axes()[-1]}=1",
            exit_code=ExitCode.DOES_NOT_FIT,
        )
    nearest = min(tried, key=lambda outcome: (outcome.missing_bytes, outcome.assumed))
    candidate = nearest.candidate
    first = nearest.worst_rank * candidate.mesh.ranks_per_stage
    device = setting.cluster.device(first)
    what = (
        f"nothing fits: rank {first} ({device.name}) needs {format_bytes(nearest.peak_bytes or 0)} of "
        f"{format_bytes(nearest.limit_bytes)}{' of host memory' if nearest.lacks_host else ''}, "
        f"{format_bytes(nearest.missing_bytes)} missing"
    )
    change, works = "", ""
    if not state.first_only:
        change, works = _nearest_change(setting, forced, nearest, state.solutions, state.solve_for)
    means = f"the nearest of {len(outcomes)} candidates is {candidate}, recompute={nearest_recompute(forced)}"
    free = 0 if nearest.lacks_host else _kept_free(setting, nearest)
    if free:
        means += f"; {format_bytes(free)} more are kept free, as memory is predicted no closer"
    error = DoesNotFit(what, nearest, _memory_of(setting, nearest), means=means, change=change, works=works)
    error.kept_free_bytes, error.memory_sure = free, setting.memory_sure(device)
    return error


def _kept_free(setting: Setting, nearest: Outcome) -> int:
    """Of the limit of its worst rank."""
    candidate, rank = nearest.candidate, nearest.worst_rank
    return setting.whole_limit(candidate, rank) - setting.limit(candidate, rank)


def _memory_of(setting: Setting, outcome: Outcome) -> dict[str, int]:
    """Of its worst rank, by kind."""
    if outcome.solution is None or not outcome.bounds:
        return {}
    chain = setting.chain(outcome.solution, outcome.recompute)
    return rank_breakdown(setting, outcome.candidate, chain, outcome.bounds, outcome.worst_rank)


def nearest_recompute(forced: Choices) -> str:
    return "none" if forced.recompute == "none" else "all"


def _nearest_change(
    setting: Setting, forced: Choices, nearest: Outcome, solutions: Solutions, solve: Solve
) -> tuple[str, str]:
    """(setting to change, value that fits)."""
    known = {(mesh.inner_part, batch): found for (mesh, batch), found in solutions.items() if found is not None}
    for name in (
        "recompute",
        "zero",
        "microbatch",
        "global_microbatch",
        "optimizer_state",
        "schedule",
        "virtual_stages",
        "cuts",
        *searched_axes(),
    ):
        default: Any = "auto" if name == "recompute" else None
        if forced.value(name) == default:
            continue
        free = forced.without(name) if default is None else replace(forced, **{name: default})
        found = first_fit(setting, free, known)
        if found is not None:
            # the leanest recomputation may be one in part
            return f"--force {name}", f"--force {name}={default}" if default else force_text(name, found)
    if not nearest.lacks_host and nearest.missing_bytes <= _kept_free(setting, nearest):
        return "--force memory_margin", "--force memory_margin=0"
    if setting.memory_limit_bytes is not None or setting.cluster.memory_limit_bytes is not None:
        need = (nearest.peak_bytes or 0) / (1.0 - setting.margin(nearest.candidate, nearest.worst_rank))
        return "--memory-limit", f"--memory-limit {need / GIB + 0.05:.1f}GiB"
    tensor = next(axis for axis in searched_axes() if axis in tensor_axes())
    for size in WIDER:  # more devices could also share a layer
        mesh = MeshShape.of({tensor: size})
        if forced.size(tensor) in (None, size) and (mesh, 1) not in known:
            found_solution = solve(mesh, 1)
            if found_solution is not None:
                known[mesh, 1] = found_solution
    found_texts = smaller_jobs(setting, forced, known, first_fit)
    change = "the job, on this hardware, or --hardware" if found_texts else "--hardware"
    for clusters in (_more_of_the_same(setting.cluster), _larger_devices(setting.cluster)):
        found_name = _first_cluster_that_fits(setting, forced, known, clusters)
        if found_name is not None:
            return change, ", or ".join([*found_texts, f"--hardware {found_name}"])
    if found_texts:
        return "the job", ", or ".join(found_texts)
    return "the model, or --seq-len", "a shorter sequence"


def first_fit(setting: Setting, forced: Choices, known: Known) -> Candidate | None:
    """A candidate that fits with most recomputation, the leanest first."""
    places = (forced.optimizer_state,) if forced.optimizer_state or not may_use_host(setting) else ("device", "host")
    tries = (_first_fit(setting, replace(forced, optimizer_state=place), known) for place in places)
    return next((found for found in tries if found is not None), None)


def _first_fit(setting: Setting, forced: Choices, known: Known) -> Candidate | None:
    num_instances = len(setting.shape.instances)
    options: Iterable[Candidate] = (
        candidate
        for candidate in enumerate_candidates(
            forced, setting.cluster.num_devices, setting.workload.global_batch, num_instances, max_tensor=1 << 30
        )
        if (candidate.mesh.inner_part, candidate.local_batch) in known and candidate.virtual_stages <= 2
    )
    lean = sorted(
        options, key=lambda c: (c.local_batch, -c.zero, c.virtual_stages, c.schedule != "1f1b", -c.pp * c.tensor_ranks)
    )
    for candidate in lean[:MAX_TRIES]:
        solution = known[candidate.mesh.inner_part, candidate.local_batch]
        recompute = NOTHING if forced.recompute == "none" else leanest_segments(setting.shape, solution)
        chain = setting.chain(solution, recompute)
        cuts = find_cuts(setting, candidate, chain)
        if cuts is not None and fits(setting, candidate, chain, cuts.bounds):
            return candidate
    return None


def _first_cluster_that_fits(setting: Setting, forced: Choices, known: Known, clusters: Iterable[str]) -> str | None:
    free = forced.without(*names(), "cuts", "optimizer_state")
    for name in clusters:
        try:
            cluster = parse_hardware(name)
        except ShardwrightError:
            continue
        larger = replace(setting, cluster=cluster, cost_model=replace(setting.cost_model, cluster=cluster))
        if first_fit(larger, free, known) is not None:
            return name
    return None


def _more_of_the_same(cluster: Cluster) -> list[str]:
    """'1x1xRTX4090' gives '2x1xRTX4090', '4x1xRTX4090', ...; none for clusters that are no single row of like hosts."""
    if len(cluster.groups) != 1 or cluster.host_pairs:
        return []
    group = cluster.groups[0]
    if group.device.kind == "cpu":
        return [f"{group.num_devices * factor}xCPU" for factor in FACTORS]
    return [f"{group.count * factor}x{group.devices_per_host}x{group.device.name}" for factor in FACTORS]


def _larger_devices(cluster: Cluster) -> list[str]:
    """Full hosts of catalog devices with more memory, the smallest device first."""
    have = max(group.device.memory_bytes for group in cluster.groups)
    larger = [e for e in accelerators().values() if e.device.memory_bytes > have and e.host_devices]
    larger.sort(key=lambda entry: entry.device.memory_bytes)
    hosts = {entry.key: -(-cluster.num_devices // entry.host_devices) for entry in larger}
    return [f"{hosts[e.key] * factor}x{e.host_devices}x{e.key}" for e in larger for factor in (1, *FACTORS[:5])]
