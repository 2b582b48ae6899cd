"""What the outer search may choose from, and what the user forces.

A candidate is a mesh (pp x dp x tp, all devices), a microbatch, a schedule with its virtual stages and a ZeRO stage.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ..costmodel.memory import Extents
from ..errors import ExitCode, ShardwrightError
from ..profiler.cluster import Cluster
from ..profiler.near import near_matches
from .schedules.library import SCHEDULES, SEARCHED, canonical_name

FORCE_KEYS = ("pp", "dp", "tp", "cp", "ep", "zero", "schedule", "microbatch", "virtual_stages", "recompute", "cuts",
              "zero_extent", "offload")  # fmt: skip
ALIASES = {"chunks": "virtual_stages"}
VIRTUAL_STAGES = (2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16)
MAX_PP = 64
RECOMPUTE_CHOICES = ("auto", "none", "all")
OFFLOAD_CHOICES = ("none", "auto")


@dataclass(frozen=True)
class Candidate:
    """microbatch: sequences that all dp ranks hold together; count of them in a step."""

    pp: int
    dp: int
    tp: int
    microbatch: int
    count: int
    schedule: str
    virtual_stages: int
    zero: int
    split: tuple[int, int] | None = None  # data-parallel ranks that share parameters, and other state; None: all

    @property
    def extents(self) -> Extents:
        """Ranks over which each kind of training state is split."""
        if self.dp == 1 or self.zero == 0:
            return Extents()
        return Extents.of(self.zero, *(self.split or (self.dp, self.dp)))

    @property
    def simplicity(self) -> tuple[int, int, int, str]:
        """Of plans as fast as each other, the least is taken."""
        return (
            self.zero,
            self.virtual_stages,
            0 if self.split is None else 1 + (self.split[0] != self.split[1]),
            self.schedule,
        )

    @property
    def local_batch(self) -> int:
        return self.microbatch // self.dp

    @property
    def num_stages(self) -> int:
        return self.pp * self.virtual_stages

    @property
    def mesh_shape(self) -> dict[str, int]:
        return {"pp": self.pp, "dp": self.dp, "cp": 1, "ep": 1, "tp": self.tp}

    def __str__(self) -> str:
        chunks = f" x{self.virtual_stages}" if self.virtual_stages > 1 else ""
        mesh = f"pp={self.pp} dp={self.dp} tp={self.tp}"
        return f"{mesh} microbatch={self.microbatch} {self.schedule}{chunks} zero={self.zero}{self.split_text}"

    @property
    def split_text(self) -> str:
        if self.split is None:
            return ""
        return (
            f" over {self.split[1]}"
            if self.zero < 3 or self.split[0] == self.split[1]
            else f" over {self.split[0]}/{self.split[1]}"
        )


@dataclass(frozen=True)
class Forced:
    """What the user fixed; None: the search decides."""

    pp: int | None = None
    dp: int | None = None
    tp: int | None = None
    zero: int | None = None
    schedule: str | None = None
    synthesize: bool = False  # an order of the plan's own, however little it saves
    microbatch: int | None = None
    virtual_stages: int | None = None
    recompute: str = "auto"
    cuts: tuple[int, ...] | None = None  # segment instance at which each next stage begins
    zero_extent: tuple[int, int] | None = None  # ranks that share parameters, ranks that share other state
    offload: bool = False  # an order of the plan's own may send activations to host memory

    @property
    def axes(self) -> dict[str, int]:
        return {name: size for name in ("pp", "dp", "tp") if (size := getattr(self, name)) is not None}


def parse_forced(force: Mapping[str, str]) -> Forced:
    """Raises ShardwrightError: unknown keys with near matches, values that are not what the key takes."""
    values: dict[str, object] = {}
    for key, text in force.items():
        name, text = key.strip().lower(), str(text).strip()
        name = ALIASES.get(name, name)
        if name not in FORCE_KEYS:
            near = near_matches(name, FORCE_KEYS)
            raise ShardwrightError(
                f"unknown force key {key!r}; known: {', '.join(FORCE_KEYS)}",
                means=f"did you mean {' or '.join(near)}?" if near else "nothing in a plan goes by that name",
                change="--force KEY=VALUE",
                works=f"--force {near[0] if near else 'pp'}={_example(near[0] if near else 'pp')}",
            )
        if name == "schedule" and text.lower() in ("auto", "synthesized"):
            values["synthesize"] = True
        elif name == "schedule":
            values[name] = canonical_name(text)
        elif name == "recompute":
            values[name] = _one_of(name, text.lower(), RECOMPUTE_CHOICES)
        elif name == "offload":
            values[name] = _one_of(name, text.lower(), OFFLOAD_CHOICES) == "auto"
        elif name == "cuts":
            values[name] = tuple(_integer(name, part, 1) for part in text.replace("/", ",").split(",") if part.strip())
        elif name == "zero_extent":
            parts = [_integer(name, part, 1) for part in text.split("/")]
            values[name] = (parts[0], parts[-1])
        elif name in ("cp", "ep"):
            if _integer(name, text, 1) != 1:
                raise ShardwrightError(
                    f"--force {name}={text}: plans have {name}=1",
                    means=f"the search space has no {'context' if name == 'cp' else 'expert'}-parallel axis",
                    change=f"--force {name}",
                    works=f"--force {name}=1",
                )
        elif name == "zero":
            values[name] = int(_one_of(name, text, ("0", "1", "2", "3")))
        else:
            values[name] = _integer(name, text, 1)
    return Forced(**values)  # type: ignore[arg-type]


def _example(key: str) -> str:
    return {
        "schedule": "1f1b",
        "recompute": "all",
        "cuts": "12",
        "zero": "1",
        "zero_extent": "8",
        "offload": "auto",
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


def _contradiction(what: str, means: str, change: str, works: str) -> ShardwrightError:
    return ShardwrightError(what, means=means, change=change, works=works, exit_code=ExitCode.CONTRADICTION)


def check_forced(forced: Forced, cluster: Cluster, global_batch: int, num_instances: int) -> None:
    """Raises ShardwrightError (exit 4) where forced values exclude each other, the devices, the batch or the model."""
    num_devices = cluster.num_devices
    _check_axes(forced, num_devices)
    _check_batch(forced, num_devices, global_batch)
    _check_stages(forced, num_devices, num_instances)
    if forced.offload:
        _check_offload(forced, cluster)


def _check_offload(forced: Forced, cluster: Cluster) -> None:
    """Is there anything that offloading could be part of?"""
    device = cluster.worst_device()
    if device.kind == "cpu":
        raise _contradiction(
            f"--force offload=auto: {device.name} has no other memory than its host's",
            "nothing would be saved",
            "--force offload",
            "--force offload=none",
        )
    if forced.schedule is not None:
        raise _contradiction(
            f"--force offload=auto: schedule {forced.schedule} is run as it was published",
            "it keeps all activations",
            "--force schedule",
            "--force schedule=auto",
        )
    if forced.pp == 1:
        raise _contradiction(
            "--force offload=auto: pp=1 has no pipeline",
            "activations are offloaded as actions of a pipeline's order",
            "--force pp",
            "--force pp=2",
        )


def _check_axes(forced: Forced, num_devices: int) -> None:
    axes = forced.axes
    product = math.prod(axes.values())
    named = " ".join(f"{name}={size}" for name, size in axes.items())
    if num_devices % product == 0 and (len(axes) < 3 or product == num_devices):
        return
    free = [name for name in ("dp", "pp", "tp") if name not in axes]
    name = free[0] if free else max(axes, key=lambda axis: axes[axis])
    rest = product // axes.get(name, 1)
    if num_devices % rest == 0:
        works = f"--force {name}={num_devices // rest}"
    else:
        name = max(axes, key=lambda axis: axes[axis])
        fits = [d for d in divisors(num_devices) if num_devices % (product // axes[name] * d) == 0] or [1]
        works = f"--force {name}={min(fits, key=lambda d: abs(d - axes[name]))}"
    raise _contradiction(
        f"forced {named} makes {product} ranks, and there are {num_devices} devices",
        "pp x dp x tp must be the number of devices",
        f"--force {name}",
        works,
    )


def _check_batch(forced: Forced, num_devices: int, global_batch: int) -> None:
    if global_batch < 1:
        raise ShardwrightError(f"a global batch of {global_batch} is no batch", change="--global-batch", works="8")
    if forced.microbatch is not None and global_batch % forced.microbatch:
        near = min(divisors(global_batch), key=lambda d: abs(d - forced.microbatch))  # type: ignore[operator]
        raise _contradiction(
            f"a global batch of {global_batch} does not divide into microbatches of {forced.microbatch}",
            "every microbatch has the same number of sequences",
            "--force microbatch or --global-batch",
            f"--force microbatch={near} or --global-batch {nearest_multiple(global_batch, forced.microbatch)}",
        )
    if forced.dp is None:
        return
    if global_batch % forced.dp:
        raise _contradiction(
            f"a global batch of {global_batch} does not divide over dp={forced.dp} data-parallel ranks",
            "every data-parallel rank takes the same number of sequences",
            "--global-batch",
            f"--global-batch {nearest_multiple(global_batch, forced.dp)}",
        )
    if forced.microbatch is not None and forced.microbatch % forced.dp:
        raise _contradiction(
            f"microbatch={forced.microbatch} does not divide over dp={forced.dp}",
            "a microbatch is global: all data-parallel ranks together hold it",
            "--force microbatch",
            f"--force microbatch={nearest_multiple(forced.microbatch, forced.dp)}",
        )


def nearest_multiple(number: int, of: int) -> int:
    return max(of, round(number / of) * of)


def _check_stages(forced: Forced, num_devices: int, num_instances: int) -> None:
    pp, chunks, schedule = forced.pp, forced.virtual_stages, forced.schedule
    if schedule is not None and chunks is not None and chunks not in SCHEDULES[schedule].chunks:
        taken = SCHEDULES[schedule].chunks
        works = taken[0]
        raise _contradiction(
            f"schedule={schedule} with virtual_stages={chunks}",
            f"{schedule} takes virtual_stages={min(taken)}{' or more' if len(taken) > 1 else ''}",
            "--force virtual_stages",
            f"--force virtual_stages={works}",
        )
    interleaved = (schedule is not None and SCHEDULES[schedule].chunks[0] > 1) or (chunks or 1) > 1
    if interleaved and (pp == 1 or num_devices == 1):
        raise _contradiction(
            f"{'schedule=' + schedule if schedule else f'virtual_stages={chunks}'} with pp=1",
            "there is no pipeline to interleave on one pipeline rank",
            "--force pp" if num_devices > 1 else "--force schedule",
            "--force pp=2" if num_devices > 1 else "--force schedule=1f1b",
        )
    least = (pp or 1) * (chunks or (2 if interleaved else 1))
    if least > num_instances:
        raise _contradiction(
            f"{least} stages forced (pp={pp or 1}, virtual_stages={chunks or 1}), and the model has {num_instances} "
            "segments",
            "a stage runs at least one segment",
            "--force pp or virtual_stages",
            f"--force pp={max(1, num_instances // (chunks or (2 if interleaved else 1)))}",
        )
    if forced.cuts is not None:
        stages = len(forced.cuts) + 1
        if list(forced.cuts) != sorted(set(forced.cuts)):
            raise _contradiction(
                f"cuts={','.join(map(str, forced.cuts))} do not rise",
                "each cut is the segment instance at which the next stage begins",
                "--force cuts",
                f"--force cuts={','.join(map(str, sorted(set(forced.cuts))))}",
            )
        if pp is not None and stages != pp * (chunks or 1) and (chunks is not None or stages % pp):
            raise _contradiction(
                f"{len(forced.cuts)} cuts make {stages} stages, and pp={pp} virtual_stages={chunks or 1} need "
                f"{pp * (chunks or 1)}",
                "there is one cut fewer than stages",
                "--force cuts",
                f"--force pp={stages}",
            )


def enumerate_candidates(
    forced: Forced, num_devices: int, global_batch: int, num_instances: int, max_tp: int, domain: int = 1
) -> Iterator[Candidate]:
    """All candidates that divide. max_tp: widest tensor axis tried, unless forced. domain: devices that fast links
    join, inside which hybrid sharding may keep a copy.
    """
    for pp in divisors(num_devices):
        if forced.pp not in (None, pp) or pp > num_instances or (pp > MAX_PP and forced.pp is None):
            continue
        for tp in divisors(num_devices // pp):
            if forced.tp not in (None, tp) or (tp > max_tp and forced.tp is None):
                continue
            dp = num_devices // pp // tp
            if forced.dp not in (None, dp) or global_batch % dp:
                continue
            for local_batch in divisors(global_batch // dp):
                microbatch = local_batch * dp
                if forced.microbatch not in (None, microbatch):
                    continue
                count = global_batch // microbatch
                for schedule, chunks in _schedules(forced, pp, num_instances):
                    for zero in _zeros(forced, dp):
                        for split in _splits(forced, zero, dp, domain // tp):
                            yield Candidate(pp, dp, tp, microbatch, count, schedule, chunks, zero, split)


def _zeros(forced: Forced, dp: int) -> Sequence[int]:
    if forced.zero is not None:
        return (forced.zero,)
    return (0,) if dp == 1 else (0, 1, 2, 3)


def _splits(forced: Forced, zero: int, dp: int, near: int) -> Iterator[tuple[int, int] | None]:
    """How far each kind of state is split: over all data-parallel ranks, or inside a fast domain of `near` of them;
    parameters inside and the rest over all is the third way."""
    if zero == 0 or dp == 1:
        if forced.zero_extent is None:
            yield None
        return
    if forced.zero_extent is not None:
        params, others = forced.zero_extent
        if dp % params == 0 and dp % others == 0 and others % params == 0:
            yield None if params == others == dp else forced.zero_extent
        return
    yield None
    if 1 < near < dp and dp % near == 0:
        yield near, near
        if zero == 3:
            yield near, dp


def _schedules(forced: Forced, pp: int, num_instances: int) -> Iterator[tuple[str, int]]:
    if pp == 1:
        name = forced.schedule or "1f1b"
        if SCHEDULES[name].chunks[0] == 1 and forced.virtual_stages in (None, 1):
            if forced.cuts in (None, ()):
                yield name, 1
        return
    for name in SEARCHED if forced.schedule is None else (forced.schedule,):
        entry = SCHEDULES[name]
        options = [1] if entry.chunks[0] == 1 else [v for v in VIRTUAL_STAGES if v in entry.chunks]
        if forced.virtual_stages is not None:
            usual = forced.schedule is not None or forced.virtual_stages > 1 or entry.chunks[0] == 1
            options = [forced.virtual_stages] if forced.virtual_stages in entry.chunks and usual else []
        for chunks in options:
            if pp * chunks <= num_instances and (forced.cuts is None or len(forced.cuts) + 1 == pp * chunks):
                yield name, chunks


def nothing_divides(
    forced: Forced, num_devices: int, global_batch: int, num_instances: int, max_tp: int, domain: int = 1
) -> ShardwrightError:
    """No candidate at all: names the nearest batch for which there is one."""

    def divides(batch: int) -> bool:
        return any(True for _ in enumerate_candidates(forced, num_devices, batch, num_instances, max_tp, domain))

    named = " ".join(f"{name}={size}" for name, size in forced.axes.items())
    under = f"{num_devices} devices" + (f" with {named}" if named else "")
    near = (batch for d in range(1, num_devices + 1) for batch in (global_batch + d, global_batch - d) if batch > 0)
    works = next((batch for batch in near if divides(batch)), None)
    if works is None:
        return _contradiction(
            f"{under} cannot be divided over a model of {num_instances} segments",
            "every stage runs at least one segment, and the tensor axis is at most as wide as the fast links",
            "--hardware or --force",
            f"--hardware with {min(num_instances, num_devices)} devices",
        )
    return _contradiction(
        f"a global batch of {global_batch} does not divide over {under}",
        f"data-parallel ranks take equal numbers of sequences, and {num_instances} segments make no more stages",
        "--global-batch",
        f"--global-batch {works}",
    )
