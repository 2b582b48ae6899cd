"""Nothing fits: how many GiB are missing on which rank, and the nearest change that fits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace

from ..errors import ExitCode, ShardwrightError
from ..profiler.cluster import Cluster
from ..profiler.hardware import parse_hardware
from ..units import GIB, format_bytes
from .candidates import Candidate, Forced, enumerate_candidates
from .evaluate import find_cuts
from .footprint import fits
from .interfaces import ShardingSolution
from .outcome import Outcome
from .setting import Setting

Solutions = Mapping[tuple[int, int, int], ShardingSolution | None]

# Most candidates looked at for one change.
MAX_TRIES = 60


def does_not_fit(
    setting: Setting, forced: Forced, outcomes: Sequence[Outcome], solutions: Solutions
) -> ShardwrightError:
    """The error to raise (exit 3). Solutions found stand in for those of other meshes with the same tensor axis."""
    tried = [outcome for outcome in outcomes if outcome.fits is False]
    if not tried:
        return ShardwrightError(
            "no tensor axis can shard this model over these devices",
            means=f"{len(outcomes)} candidates, all without a sharding",
            change="--force tp",
            works="--force tp=1",
            exit_code=ExitCode.DOES_NOT_FIT,
        )
    nearest = min(tried, key=lambda outcome: outcome.missing_bytes)
    candidate = nearest.candidate
    first = nearest.worst_rank * candidate.dp * candidate.tp
    device = setting.cluster.device(first)
    what = (
        f"nothing fits: rank {first} ({device.name}) needs {format_bytes(nearest.peak_bytes or 0)} of "
        f"{format_bytes(nearest.limit_bytes)}, {format_bytes(nearest.missing_bytes)} missing"
    )
    change, works = _nearest_change(setting, forced, nearest, solutions)
    return ShardwrightError(
        what,
        means=f"the nearest of {len(outcomes)} candidates is {candidate}, recompute={nearest_recompute(forced)}",
        change=change,
        works=works,
        exit_code=ExitCode.DOES_NOT_FIT,
    )


def nearest_recompute(forced: Forced) -> str:
    return "none" if forced.recompute == "none" else "all"


def _nearest_change(setting: Setting, forced: Forced, nearest: Outcome, solutions: Solutions) -> tuple[str, str]:
    """(setting to change, value that fits)."""
    known = {(tp, batch): found for (_, tp, batch), found in solutions.items() if found is not None}
    for name in ("recompute", "zero", "microbatch", "schedule", "virtual_stages", "cuts", "pp", "dp", "tp"):
        default = "auto" if name == "recompute" else None
        if getattr(forced, name) == default:
            continue
        found = first_fit(setting, replace(forced, **{name: default}), known)
        if found is not None:
            value = "all" if name == "recompute" else getattr(found, name, None)
            return f"--force {name}", f"--force {name}={value}" if value is not None else f"no --force {name}"
    if setting.memory_limit_bytes is not None or setting.cluster.memory_limit_bytes is not None:
        need = nearest.peak_bytes or 0
        return "--memory-limit", f"--memory-limit {need / GIB + 0.05:.1f}GiB"
    more = _more_devices(setting, forced, known)
    if more is not None:
        return "--hardware", f"--hardware {more}"
    larger = _larger_device(setting, nearest.peak_bytes or 0)
    if larger is not None:
        return "--hardware", f"--hardware {larger}"
    return "a smaller model or a shorter sequence", f"devices with {(nearest.peak_bytes or 0) / GIB:.0f} GiB"


def first_fit(setting: Setting, forced: Forced, known: Mapping[tuple[int, int], ShardingSolution]) -> Candidate | None:
    """A candidate that fits with most recomputation, the leanest first."""
    num_instances = len(setting.shape.instances)
    options: Iterable[Candidate] = (
        candidate
        for candidate in enumerate_candidates(
            forced, setting.cluster.num_devices, setting.workload.global_batch, num_instances, max_tp=1 << 30
        )
        if (candidate.tp, candidate.local_batch) in known and candidate.virtual_stages <= 2
    )
    lean = sorted(options, key=lambda c: (c.local_batch, -c.zero, c.virtual_stages, c.schedule != "1f1b", -c.pp * c.tp))
    for candidate in lean[:MAX_TRIES]:
        solution = known[candidate.tp, candidate.local_batch]
        recompute = frozenset() if forced.recompute == "none" else frozenset(setting.shape.segments)
        chain = setting.chain(solution, recompute)
        cuts = find_cuts(setting, candidate, chain)
        if cuts is not None and fits(setting, candidate, chain, cuts.bounds):
            return candidate
    return None


def _more_devices(setting: Setting, forced: Forced, known: Mapping[tuple[int, int], ShardingSolution]) -> str | None:
    """The name of the smallest cluster of more hosts (or processes) of the same kind on which something fits."""
    for factor in (2, 4, 8, 16, 32, 64, 128, 256, 512):
        name = scaled_name(setting.cluster, factor)
        if name is None:
            return None
        try:
            cluster = parse_hardware(name)
        except ShardwrightError:
            return None
        limits = {field.name: None for field in fields(forced) if field.name in ("pp", "dp", "tp", "cuts")}
        larger = replace(
            setting,
            cluster=cluster,
            cost_model=replace(setting.cost_model, cluster=cluster),
        )
        if first_fit(larger, replace(forced, **limits), known) is not None:  # type: ignore[arg-type]
            return name
    return None


def scaled_name(cluster: Cluster, factor: int) -> str | None:
    """'1x1xRTX4090' times 16 gives '16x1xRTX4090'; None for clusters that are no single row of like hosts."""
    if len(cluster.groups) != 1 or cluster.host_pairs:
        return None
    group = cluster.groups[0]
    if group.device.kind == "cpu":
        return f"{group.num_devices * factor}xCPU"
    return f"{group.count * factor}x{group.devices_per_host}x{group.device.name}"


def _larger_device(setting: Setting, need_bytes: int) -> str | None:
    """The smallest device of the catalog that has that much memory, in equal number."""
    from ..profiler.accelerators import accelerators

    fitting = [
        entry for entry in accelerators().values() if entry.device.memory_bytes >= need_bytes and entry.host_devices
    ]
    if not fitting:
        return None
    entry = min(fitting, key=lambda item: item.device.memory_bytes)
    count = setting.cluster.num_devices
    return (
        f"{count}x{entry.key}"
        if count <= entry.host_devices
        else f"{-(-count // entry.host_devices)}x{entry.host_devices}x{entry.key}"
    )
