"""What the user forces: read from text, and checked against itself, the devices, the batch and the model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import ExitCode, ShardwrightError
from ...ops.attention_rules import FORMS
from ...ops.expert_rules import FORMS as EXPERT_FORMS
from ...plans.axes import easiest_first, expert_axes, free_axis, names, role_of, sequence_axes
from ...profiler.cluster import Cluster
from ...profiler.near import near_matches
from ...schedules.published.library import SCHEDULES, canonical_name
from .choices import Choices

CHOICES = ("zero", "schedule", "microbatch", "global_microbatch", "virtual_stages", "recompute", "cuts", "zero_extent",
           "offload", "optimizer_state", "prefer", "attention", "experts", "sequence_parallel",
           "memory_margin", "loss", "expert_imbalance")  # fmt: skip
ALIASES = {"chunks": "virtual_stages", "micro_batch_size": "microbatch"}
WORDS = {
    "recompute": ("auto", "none", "selective", "all"),
    "optimizer_state": ("device", "host"),
    "prefer": ("time", "state", "memory"),
    "attention": ("auto", *FORMS),
    "experts": ("auto", *EXPERT_FORMS),
    "loss": ("auto", "chunked", "whole"),
    "sequence_parallel": ("auto", "off"),
}


def force_keys() -> tuple[str, ...]:
    """Everything that may be forced, axes of the mesh first."""
    return (*sorted(names(), key=lambda name: not role_of(name).is_searched), *CHOICES)


def parse_forced(force: Mapping[str, str]) -> Choices:
    """Raises ShardwrightError: unknown keys with near matches, values that are not what the key takes."""
    values: dict[str, Any] = {}
    sizes: dict[str, int] = {}
    known = force_keys()
    for key, text in force.items():
        name, text = key.strip().lower(), str(text).strip()
        name = ALIASES.get(name, name)
        if name not in known:
            near = near_matches(name, known)
            raise ShardwrightError(
                f"unknown force key {key!r}; known: {', '.join(known)}",
                means=f"did you mean {' or '.join(near)}?" if near else "nothing in a plan goes by that name",
                change="--force KEY=VALUE",
                works=f"--force {near[0] if near else 'pp'}={_example(near[0] if near else 'pp')}",
            )
        if name == "schedule" and text.lower() in ("auto", "synthesized"):
            values["synthesize"] = True
        elif name == "schedule":
            values[name] = canonical_name(text)
        elif name in WORDS:
            values[name] = _one_of(name, text.lower(), WORDS[name])
        elif name == "offload":
            values[name] = _one_of(name, text.lower(), ("none", "auto")) == "auto"
        elif name == "memory_margin":
            values[name] = _share(name, text)
        elif name == "expert_imbalance":
            imbalance_of(text)
            values[name] = text
        elif name == "cuts":
            values[name] = tuple(_integer(name, part, 1) for part in text.replace("/", ",").split(",") if part.strip())
        elif name == "zero_extent":
            parts = [_integer(name, part, 1) for part in text.split("/")]
            values[name] = (parts[0], parts[-1])
        elif name in names():
            sizes[name] = _integer(name, text, 1)
        elif name == "zero":
            values[name] = int(_one_of(name, text, ("0", "1", "2", "3")))
        else:
            values[name] = _integer(name, text, 1)
    return Choices.of(sizes, **values)


def _example(key: str) -> str:
    return {
        "schedule": "1f1b",
        "recompute": "all",
        "cuts": "12",
        "zero": "1",
        "zero_extent": "8",
        "offload": "auto",
        "optimizer_state": "host",
        "prefer": "memory",
        "attention": "gather",
        "experts": "dispatch",
        "loss": "chunked",
        "sequence_parallel": "off",
        "memory_margin": "0",
        "expert_imbalance": "1.1",
    }.get(key, "2")


def _integer(key: str, text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise ShardwrightError(
            f"--force {key}={text}: {key} takes a whole number, {least} or more",
            change=f"--force {key}",
            works=f"--force {key}={_example(key)}",
        )
    return value


def _share(key: str, text: str) -> float:
    """0.1, 10 and 10% are the same: numbers from 1 on are percentages."""
    try:
        number = float(text.removesuffix("%"))
    except ValueError:
        number = -1.0
    value = number / 100 if text.endswith("%") or number >= 1 else number
    if not 0 <= value < 1:
        raise ShardwrightError(
            f"--force {key}={text}: {key} takes a share of the limit below 1, or a percentage from 1 to less than 100",
            means="so much of each device's memory is to be left free",
            change=f"--force {key}",
            works=f"--force {key}={_example(key)}",
        )
    return value


def imbalance_of(text: str) -> tuple[tuple[int, float], ...]:
    """(ranks, factor): of 0 ranks, for any number. "1.1" or "4:1.1/8:1.2"; nothing of "auto"."""
    if text == "auto":
        return ()
    found = []
    for part in text.split("/"):
        ranks, _, factor = part.rpartition(":")
        try:
            found.append((int(ranks or 0), float(factor)))
        except ValueError:
            found.append((0, 0.0))
    if any(not 1 <= factor < math.inf or ranks < 0 for ranks, factor in found):
        raise ShardwrightError(
            f"--force expert_imbalance={text}: it takes a factor of 1 or more, or RANKS:FACTOR/RANKS:FACTOR/...",
            means="so many times the mean of all ranks goes to the rank that most tokens go to",
            change="--force expert_imbalance",
            works="--force expert_imbalance=1.1",
        )
    return tuple(found)


def _one_of(key: str, text: str, choices: Sequence[str]) -> str:
    if text not in choices:
        raise ShardwrightError(
            f"--force {key}={text}: {key} takes {', '.join(choices)}",
            change=f"--force {key}",
            works=f"--force {key}={_example(key)}",
        )
    return text


def divisors(number: int) -> list[int]:
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def contradiction(what: str, means: str, change: str, works: str) -> ShardwrightError:
    return ShardwrightError(what, means=means, change=change, works=works, exit_code=ExitCode.CONTRADICTION)


def check_forced(
    forced: Choices, cluster: Cluster, global_batch: int, num_instances: int, num_experts: int = 0
) -> None:
    """Raises ShardwrightError (exit 4) where forced values exclude each other, the devices, the batch or the model."""
    num_devices = cluster.num_devices
    _check_axes(forced, num_devices)
    _check_batch(forced, num_devices, global_batch)
    _check_stages(forced, num_devices, num_instances)
    _check_experts(forced, num_experts)
    if forced.offload:
        _check_offload(forced, cluster)
    device = cluster.worst_device()
    if forced.optimizer_state == "host" and device.kind != "cpu" and not device.host_memory_bytes:
        raise contradiction(
            f"--force optimizer_state=host: nothing is known of the memory of the host of {device.name}",
            "what would be there could not be counted",
            "host_memory_gib of its [[hosts]] in a hardware file, or --force optimizer_state",
            "--force optimizer_state=device",
        )


def _check_offload(forced: Choices, cluster: Cluster) -> None:
    """Is there anything that offloading could be part of?"""
    device = cluster.worst_device()
    if device.kind == "cpu":
        raise contradiction(
            f"--force offload=auto: {device.name} has no other memory than its host's",
            "nothing would be saved",
            "--force offload",
            "--force offload=none",
        )
    if forced.schedule is not None:
        raise contradiction(
            f"--force offload=auto: schedule {forced.schedule} is run as it was published",
            "it keeps all activations",
            "--force schedule",
            "--force schedule=auto",
        )
    if forced.pp == 1:
        raise contradiction(
            "--force offload=auto: pp=1 has no pipeline",
            "activations are offloaded as actions of a pipeline's order",
            "--force pp",
            "--force pp=2",
        )


def _check_axes(forced: Choices, num_devices: int) -> None:
    axes = forced.factors
    product = math.prod(axes.values())
    named = " ".join(f"{name}={size}" for name, size in axes.items())
    free = [name for name in easiest_first() if role_of(name).is_searched and name not in axes]
    if num_devices % product == 0 and (free or product == num_devices):
        return
    name = free[0] if free else max(axes, key=lambda axis: axes[axis])
    rest = product // axes.get(name, 1)
    if num_devices % rest == 0:
        works = f"--force {name}={num_devices // rest}"
    else:
        name = max(axes, key=lambda axis: axes[axis])
        fits = [d for d in divisors(num_devices) if num_devices % (product // axes[name] * d) == 0] or [1]
        works = f"--force {name}={min(fits, key=lambda d: abs(d - axes[name]))}"
    raise contradiction(
        f"forced {named} makes {product} ranks, and there are {num_devices} devices",
        f"{' x '.join(names(lambda role: role.is_searched or role.name in axes))} must be the number of devices",
        f"--force {name}",
        works,
    )


def _check_batch(forced: Choices, num_devices: int, global_batch: int) -> None:
    if global_batch < 1:
        raise ShardwrightError(f"a global batch of {global_batch} is no batch", change="--global-batch", works="8")
    _check_microbatch(forced, global_batch)
    _check_sequences(forced)
    ranks = _batch_ranks(forced)
    if ranks is not None and global_batch % ranks:
        raise contradiction(
            f"a global batch of {global_batch} does not divide over {_batch_text(forced)} data-parallel ranks",
            "every data-parallel rank takes the same number of sequences",
            "--global-batch",
            f"--global-batch {nearest_multiple(global_batch, ranks)}",
        )
    _check_microbatch_of_ranks(forced, global_batch)


def _check_sequences(forced: Choices) -> None:
    """Cut sequences come one at a time: the tokens of one lie together in memory, those of several do not."""
    cut = [(axis, size) for axis, size in forced.axes.items() if role_of(axis).carries_sequence and size > 1]
    if cut and (forced.microbatch or 1) > 1:
        raise contradiction(
            f"microbatch={forced.microbatch} with {cut[0][0]}={cut[0][1]}",
            f"each rank has its part of one sequence at a time, {forced.microbatch} of which are as many microbatches",
            "--force microbatch",
            "--force microbatch=1",
        )
    if forced.attention != "auto" and not cut:
        raise contradiction(
            f"attention={forced.attention} where no sequence is cut",
            "it says how attention runs on a context axis",
            f"--force {sequence_axes()[0]}",
            f"--force {sequence_axes()[0]}=2",
        )


def _check_experts(forced: Choices, num_experts: int) -> None:
    """An axis that cuts experts divides the data ranks, and has experts to cut."""
    (axis,) = expert_axes()
    size, whole = forced.size(axis) or 1, forced.size(free_axis())
    if size > 1 and num_experts == 0:
        raise contradiction(
            f"{axis}={size}, and the model has no experts that can be split",
            "it splits the experts of layers that send each token to some of them",
            f"--force {axis}",
            f"--force {axis}=1",
        )
    if size > max(1, num_experts):
        raise contradiction(
            f"{axis}={size}, and a layer of the model has {num_experts} experts",
            "every rank of the axis has an expert at least",
            f"--force {axis}",
            f"--force {axis}={max(d for d in divisors(size) if d <= num_experts)}",
        )
    if whole is not None and whole % size:
        near = max(d for d in divisors(whole) if d <= size)
        raise contradiction(
            f"{axis}={size} does not divide {free_axis()}={whole}",
            f"experts are split over a part of the {free_axis()} ranks",
            f"--force {axis}",
            f"--force {axis}={near}",
        )
    if forced.experts != "auto" and size == 1:
        raise contradiction(
            f"experts={forced.experts} where no experts are split",
            "it says how their work is shared on an expert axis",
            f"--force {axis}" if num_experts else "--force experts",
            f"--force {axis}=2" if num_experts else "--force experts=auto",
        )


def _batch_ranks(forced: Choices) -> int | None:
    """Ranks that together hold a microbatch, where that is forced."""
    if forced.size(free_axis()) is None:
        return None
    return math.prod(size for axis, size in forced.factors.items() if role_of(axis).carries_batch)


def _batch_text(forced: Choices) -> str:
    return " ".join(f"{axis}={size}" for axis, size in forced.factors.items() if role_of(axis).carries_batch)


def _check_microbatch(forced: Choices, global_batch: int) -> None:
    """Does the global batch divide into microbatches, however many ranks hold one?"""
    for name, on in (("microbatch", " on each data-parallel rank"), ("global_microbatch", "")):
        size = getattr(forced, name)
        if size is not None and global_batch % size:
            near = min(divisors(global_batch), key=lambda d: abs(d - size))
            raise contradiction(
                f"a global batch of {global_batch} does not divide into microbatches of {size} sequences{on}",
                "every microbatch has the same number of sequences",
                f"--force {name} or --global-batch",
                f"--force {name}={near} or --global-batch {nearest_multiple(global_batch, size)}",
            )


def _check_microbatch_of_ranks(forced: Choices, global_batch: int) -> None:
    """Does it divide over the data-parallel ranks, as far as those are known?"""
    ranks, local, whole = _batch_ranks(forced), forced.microbatch, forced.global_microbatch
    named = _batch_text(forced)
    if ranks is not None and local is not None and global_batch % (ranks * local):
        near = min(divisors(global_batch // ranks), key=lambda d: abs(d - local))
        raise contradiction(
            f"microbatch={local} on each of {named} data-parallel ranks is {ranks * local} sequences, which a global "
            f"batch of {global_batch} does not divide into",
            f"each rank has {global_batch // ranks} sequences of the batch, and takes as many in every microbatch",
            "--force microbatch",
            f"--force microbatch={near}",
        )
    if ranks is not None and whole is not None and whole % ranks:
        fit = [d * ranks for d in divisors(global_batch // ranks)]
        raise contradiction(
            f"global_microbatch={whole} does not divide over {named}",
            "all data-parallel ranks together hold it; --force microbatch counts the sequences of one rank",
            "--force global_microbatch",
            f"--force global_microbatch={min(fit, key=lambda size: abs(size - whole))}",
        )
    if local is not None and whole is not None and (whole % local or (ranks is not None and whole != local * ranks)):
        raise contradiction(
            f"microbatch={local} and global_microbatch={whole}" + (f" with {named}" if ranks is not None else ""),
            f"the second is the first times {free_axis()}",
            "--force global_microbatch",
            f"--force global_microbatch={local * (ranks or 1)}",
        )


def nearest_multiple(number: int, of: int) -> int:
    return max(of, round(number / of) * of)


def _check_stages(forced: Choices, num_devices: int, num_instances: int) -> None:
    pp, chunks, schedule = forced.pp, forced.virtual_stages, forced.schedule
    if schedule is not None and chunks is not None and chunks not in SCHEDULES[schedule].chunks:
        taken = SCHEDULES[schedule].chunks
        works = taken[0]
        raise contradiction(
            f"schedule={schedule} with virtual_stages={chunks}",
            f"{schedule} takes virtual_stages={min(taken)}{' or more' if len(taken) > 1 else ''}",
            "--force virtual_stages",
            f"--force virtual_stages={works}",
        )
    interleaved = (schedule is not None and SCHEDULES[schedule].chunks[0] > 1) or (chunks or 1) > 1
    if interleaved and (pp == 1 or num_devices == 1):
        raise contradiction(
            f"{'schedule=' + schedule if schedule else f'virtual_stages={chunks}'} with pp=1",
            "there is no pipeline to interleave on one pipeline rank",
            "--force pp" if num_devices > 1 else "--force schedule",
            "--force pp=2" if num_devices > 1 else "--force schedule=1f1b",
        )
    least = (pp or 1) * (chunks or (2 if interleaved else 1))
    if least > num_instances:
        raise contradiction(
            f"{least} stages forced (pp={pp or 1}, virtual_stages={chunks or 1}), and the model has {num_instances} "
            "segments",
            "a stage runs at least one segment",
            "--force pp or virtual_stages",
            f"--force pp={max(1, num_instances // (chunks or (2 if interleaved else 1)))}",
        )
    if forced.cuts is not None:
        stages = len(forced.cuts) + 1
        if list(forced.cuts) != sorted(set(forced.cuts)):
            raise contradiction(
                f"cuts={','.join(map(str, forced.cuts))} do not rise",
                "each cut is the segment instance at which the next stage begins",
                "--force cuts",
                f"--force cuts={','.join(map(str, sorted(set(forced.cuts))))}",
            )
        if pp is not None and stages != pp * (chunks or 1) and (chunks is not None or stages % pp):
            raise contradiction(
                f"{len(forced.cuts)} cuts make {stages} stages, and pp={pp} virtual_stages={chunks or 1} need "
                f"{pp * (chunks or 1)}",
                "there is one cut fewer than stages",
                "--force cuts",
                f"--force pp={stages}",
            )
