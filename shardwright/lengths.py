"""plan --lengths: sequences of different lengths, each on a group of ranks that is as wide as it needs.

Lengths are those of a file, one a line ("4096", or "4096 12" for twelve of them), or drawn from a distribution that is
stated: lognormal:median=4096,sigma=1.2,max=262144,seed=0. A step takes --global-batch of them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .costmodel.model import CostModel
from .costmodel.stacks import Stack
from .errors import ExitCode, ShardwrightError
from .planner.lengths.assignment import Assignment, GroupWork, assign_in_rounds, of_width
from .planner.lengths.work import ALL, NONE, Policy, free_bytes, group_works
from .planner.sharding.sharder import Sharder
from .profiler.cluster import Cluster
from .profiler.workload import Workload

DISTRIBUTION = "lognormal:"
_FIELDS: Mapping[str, float] = {"median": 4096, "sigma": 1.2, "max": 262144, "seed": 0}
CAPTURED_TOKENS = 32768  # of the sequence that is captured, where none is as long
STAGES = (1, 2, 3)  # of ZeRO, the first that leaves room for the longest sequence is taken


def read_lengths(text: str, count: int) -> list[int]:
    """count: of a step; a file that has fewer is repeated, of one that has more the first are taken."""
    found = _drawn(text, count) if text.startswith(DISTRIBUTION) else _from_file(Path(text))
    return [found[k % len(found)] for k in range(count)]


def _drawn(text: str, count: int) -> list[int]:
    given = dict(_FIELDS)
    for part in filter(None, text.removeprefix(DISTRIBUTION).split(",")):
        name, _, value = part.partition("=")
        try:
            given[name] = {name: float(value)}[name] if name in _FIELDS else math.nan
        except ValueError:
            given[name] = math.nan
        if not math.isfinite(given[name]) or given[name] < (0 if name in ("seed", "sigma") else 1):
            raise _bad(f"{part!r} in {text!r}", f"a distribution is stated by {', '.join(_FIELDS)}, as numbers")
    drawn = np.random.default_rng(int(given["seed"])).normal(math.log(given["median"]), given["sigma"], count)
    return [int(length) for length in np.clip(np.exp(np.minimum(drawn, 60.0)), 1, given["max"])]


def _from_file(path: Path) -> list[int]:
    try:
        lines = path.read_text().split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise _bad(f"{path} cannot be read: {error}", "it is to hold lengths, one a line") from None
    found: list[int] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
            raise _bad(
                f"line {number} of {path} is {line.strip()!r}", "a line is a length in tokens, or a length and how many"
            )
        found += [int(words[0])] * (int(words[1]) if len(words) == 2 else 1)
    if not found:
        raise _bad(f"{path} has no lengths", "it is to hold lengths, one a line")
    return found


def _bad(what: str, means: str) -> ShardwrightError:
    return ShardwrightError(
        f"--lengths: {what}", means=means, change="--lengths", works=f"--lengths {DISTRIBUTION}median=4096,sigma=1.2"
    )


@dataclass(frozen=True)
class LengthsPlan:
    """uniform: by width, the step where all groups have it; absent where the longest sequence does not fit. bound_s: of
    any assignment under the same costs. solve_s: of the assignment of one step's sequences."""

    lengths: list[int]
    num_ranks: int
    policy: Policy
    works: list[GroupWork]
    found: Assignment
    uniform: dict[int, float]
    solve_s: float

    @property
    def speedup(self) -> float:
        """Over the best single width."""
        return min(self.uniform.values()) / self.found.seconds if self.uniform else math.inf

    def to_dict(self) -> dict[str, Any]:
        return {
            "num_ranks": self.num_ranks,
            "num_sequences": len(self.lengths),
            "tokens": sum(self.lengths),
            "longest": max(self.lengths),
            "zero": self.policy.zero,
            "recompute": self.policy.recompute,
            "step_s": self.found.seconds,
            "bound_s": self.found.bound_s,
            "single_width_step_s": {str(width): seconds for width, seconds in self.uniform.items()},
            "speedup": self.speedup,
            "solve_s": self.solve_s,
            "widths": [
                {"width": w.width, "linear_s": w.linear_s, "quadratic_s": w.quadratic_s, "most_tokens": w.most_tokens}
                for w in self.works
            ],
            "groups": [
                {
                    "round": g.round,
                    "width": g.width,
                    "seconds": g.seconds,
                    "lengths": [self.lengths[i] for i in g.sequences],
                }
                for g in self.found.groups
            ],
        }


def plan_lengths(
    workload_of: Callable[[int], Workload], cluster: Cluster, lengths: list[int], force: Mapping[str, str], stack: Stack
) -> LengthsPlan:
    """workload_of: tokens of its sequences -> a Workload. Raises ShardwrightError where the longest fits nowhere, and
    for what is forced: an assignment decides widths, ZeRO stage and recomputation itself."""
    from .api import captured_for
    from .jobs import job_of

    if force:
        key = next(iter(force))
        raise ShardwrightError(
            f"--lengths and --force {key}={force[key]}",
            means="an assignment decides the width of each group, the ZeRO stage and recomputation itself",
            change="--force",
            works="leave it out, or leave --lengths out and plan for the longest sequence",
            exit_code=ExitCode.CONTRADICTION,
        )
    num_ranks, cost_model = cluster.num_devices, CostModel(cluster, stack=stack)
    widest = num_ranks & -num_ranks
    tokens = max(widest * 16, min(CAPTURED_TOKENS, max(lengths)) // widest * widest)
    captured = captured_for(workload_of(tokens), cost_model, "chunked")
    sharder = Sharder(captured.graph, cost_model, job=job_of(captured.workload, len(lengths), {}))
    found: list[LengthsPlan] = []
    works: list[GroupWork] = []
    for zero in STAGES:
        free = free_bytes(sharder, captured.graph, zero, num_ranks)
        for recompute in (NONE, ALL):
            policy = Policy(recompute, zero)
            works = group_works(sharder, captured.graph, tokens, num_ranks, policy, free)
            one = _assigned(lengths, works, num_ranks, policy)
            found += [one] if one is not None else []
        if found:
            break
    if not found:
        raise _too_long(lengths, works)
    uniform = {width: min(s for one in found for w, s in one.uniform.items() if w == width)
               for width in sorted({w for one in found for w in one.uniform})}  # fmt: skip
    best = min(found, key=lambda one: one.found.seconds)
    return LengthsPlan(lengths, num_ranks, best.policy, best.works, best.found, uniform, best.solve_s)


def _assigned(lengths: list[int], works: list[GroupWork], num_ranks: int, policy: Policy) -> LengthsPlan | None:
    started = time.perf_counter()
    found = assign_in_rounds(lengths, works, num_ranks)
    solve_s = time.perf_counter() - started
    if found is None:
        return None
    alone = {work.width: of_width(lengths, work, num_ranks) for work in works}
    uniform = {width: one.seconds for width, one in alone.items() if one is not None}
    return LengthsPlan(lengths, num_ranks, policy, works, found, uniform, solve_s)


def _too_long(lengths: list[int], works: list[GroupWork]) -> ShardwrightError:
    most = max((work.most_tokens for work in works), default=0)
    return ShardwrightError(
        f"the longest sequence has {max(lengths):,} tokens, and all devices together hold {most:,} of one",
        means="with every layer recomputed and state split over all ranks (ZeRO 3) no group is wide enough",
        change="--lengths or --hardware",
        works=f"lengths of at most {most}" if most else "devices with more memory",
        exit_code=ExitCode.DOES_NOT_FIT,
    )


def print_lengths(plan: LengthsPlan) -> None:
    tokens = sum(plan.lengths)
    print(f"{len(plan.lengths)} sequences of {min(plan.lengths):,} to {max(plan.lengths):,} tokens, {tokens:,} in all")
    rounds = "one round" if all(group.round == 0 for group in plan.found.groups) else "any number of rounds"
    bound = f"no assignment in {rounds} is below {plan.found.bound_s:.3f} s"
    print(f"predicted step  {plan.found.seconds:.3f} s, {bound}")
    print(f"ZeRO {plan.policy.zero} over all {plan.num_ranks} ranks, recompute {plan.policy.recompute}")
    print(f"assigned in     {plan.solve_s:.2f} s")
    print(f"{'round':>5} {'width':>6} {'groups':>7} {'sequences':>10} {'tokens':>12} {'longest':>9} {'busiest':>10}")
    for number, width in sorted({(group.round, group.width) for group in plan.found.groups}):
        groups = [group for group in plan.found.groups if (group.round, group.width) == (number, width)]
        own = [plan.lengths[i] for group in groups for i in group.sequences]
        busiest, longest = max(group.seconds for group in groups), max(own, default=0)
        counts = f"{number + 1:>5} {width:>6} {len(groups):>7} {len(own):>10}"
        print(f"{counts} {sum(own):>12,} {longest:>9,} {busiest:>8.3f} s")
    for width, seconds in plan.uniform.items():
        print(f"all groups {width} wide: {seconds:.3f} s, {seconds / plan.found.seconds:.2f} times as long")
