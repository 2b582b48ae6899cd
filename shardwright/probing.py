"""Plans of one training job at other sizes and on other clusters, to find out what fits.

The model is captured once for each sequence length; every other size and every cluster of the same devices is planned
on that graph. A probe asks the planner for the first plan that fits; the job itself for the fastest.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .adapters import with_lora
from .api import Captured, captured_for
from .costmodel.model import CostModel
from .errors import ExitCode, ShardwrightError
from .jobs import job_of
from .planner.search.does_not_fit import DoesNotFit
from .planner.search.result import SearchResult
from .planner.search.search import first_that_fits, search
from .planner.sharding.pins import Pins, choices_of, is_pin
from .planner.sharding.sharder import Sharder
from .planner.space.forcing import parse_forced
from .plans.axes import placement_axes
from .profiler.capture import no_collection
from .profiler.cluster import Cluster
from .profiler.watch import TimeUp, stop_at, telling
from .profiler.workload import Workload
from .units import format_bytes

MOST_GRAPHS = 3  # kept for sizes to come

Load = Callable[[int | None], Workload]  # at a sequence length; None: the model's own


class OutOfTime(Exception):
    """The time limit has passed; what was proven until then holds."""


@dataclass(frozen=True)
class Size:
    """Of a job. seq_len: None for the model's own. lora: adapters alone are trained. force: choices beside those of the
    user."""

    global_batch: int
    seq_len: int | None = None
    lora: bool = False
    force: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Verdict:
    """Of one plan, or of the nearest where none fits. memory: bytes of the worst rank by kind; they sum to peak_bytes,
    0 where nothing is known. limit_bytes: of the peak as predicted; kept_free_bytes beyond it are left to the
    prediction's error, which was no larger in memory_sure of runs. reason: why there is none. plan: its mesh and sizes,
    in words."""

    fits: bool
    peak_bytes: int = 0
    limit_bytes: int = 0
    memory: Mapping[str, int] = field(default_factory=dict)
    reason: str = ""
    plan: str = ""
    batch_ranks: int = 1
    microbatch: int = 0
    recomputes: bool = False
    host_bytes: int = 0
    step_s: float | None = None
    kept_free_bytes: int = 0
    memory_sure: float = 0.0

    @property
    def margin_bytes(self) -> int:
        return self.limit_bytes - self.peak_bytes

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "memory": dict(self.memory), "margin_bytes": self.margin_bytes}


class Prober:
    """Makes the plans. load: the user's job at a sequence length. say: told of each plan to be made; tell: of what is
    done for it."""

    def __init__(
        self,
        load: Load,
        force: Mapping[str, str],
        *,
        memory_limit_bytes: int | None = None,
        time_limit_s: float | None = None,
        say: Callable[[str], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        self.load, self.force, self.memory_limit_bytes = load, dict(force), memory_limit_bytes
        self.say, self.tell = say or (lambda message: None), tell
        self.forced = parse_forced(choices_of(self.force))  # a mistyped key is found before the model is traced
        self.pins = Pins.parse({k: v for k, v in self.force.items() if is_pin(k, v)}, placement_axes())
        self.deadline = float("inf") if time_limit_s is None else time.monotonic() + time_limit_s
        self.time_limit_s = time_limit_s
        self.num_plans = 0
        self._loaded: dict[tuple[int | None, bool], Workload] = {}
        self._captured: dict[tuple[int | None, bool, str], Captured] = {}

    def workload(self, seq_len: int | None, lora: bool = False) -> Workload:
        key = (seq_len, lora)
        if key not in self._loaded:
            self._loaded[key] = with_lora(self.workload(seq_len)) if lora else self.load(seq_len)
        return self._loaded[key]

    def verdict(self, cluster: Cluster, size: Size) -> Verdict:
        """The first plan that fits, or that there is none. Raises OutOfTime."""
        try:
            return self._described(self._search(cluster, size, first_only=True))
        except DoesNotFit as error:
            return _refused(error)
        except ShardwrightError as error:
            if error.exit_code == ExitCode.TIME_LIMIT:
                raise OutOfTime from None
            if error.exit_code in (ExitCode.CONTRADICTION, ExitCode.DOES_NOT_FIT):
                return Verdict(False, reason=error.what)
            raise

    def refusal(self, seq_len: int) -> Verdict | None:
        """Of a sequence that the model itself does not take."""
        try:
            self.workload(seq_len)
        except ShardwrightError as error:
            return Verdict(False, reason=error.what)
        return None

    def job(self, cluster: Cluster, size: Size) -> Verdict:
        """The fastest plan. Raises ShardwrightError for all but what does not fit."""
        try:
            return self._described(self._search(cluster, size, first_only=False))
        except DoesNotFit as error:
            return _refused(error)

    @no_collection()
    def _search(self, cluster: Cluster, size: Size, first_only: bool) -> SearchResult:
        if self.memory_limit_bytes is not None:
            cluster = cluster.with_memory_limit(self.memory_limit_bytes)
        cost_model = CostModel(cluster)
        captured = self._capture(cost_model, size)
        workload = dataclasses.replace(captured.workload, global_batch=size.global_batch)
        job = job_of(workload, size.global_batch, self.force)
        left_s = None if self.time_limit_s is None else max(0.0, self.deadline - time.monotonic())
        self.num_plans += 1
        find = first_that_fits if first_only else search
        return find(
            captured.graph,
            cost_model,
            workload,
            Sharder(captured.graph, cost_model, None, self.pins, left_s, job),
            force={**choices_of(self.force), **dict(size.force)},
            time_limit_s=left_s,
            progress=self.tell,
        )

    def _capture(self, cost_model: CostModel, size: Size) -> Captured:
        """Kernels are fused where they win on the device, so each kind of device has its own."""
        key = (size.seq_len, size.lora, cost_model.cluster.worst_device().name)
        if key not in self._captured:
            try:
                with stop_at(self.deadline), telling(self.tell):
                    workload = self.workload(size.seq_len, size.lora)
                    loss = parse_forced(choices_of(self.force)).loss
                    self._captured[key] = captured_for(workload, cost_model, loss)
            except TimeUp:
                raise ShardwrightError(
                    f"the time limit of {self.time_limit_s:g} s passed while the model was captured",
                    means="nothing is known of this size yet",
                    change="--time-limit",
                    works=f"--time-limit {max(60, round(10 * (self.time_limit_s or 6)))}",
                    exit_code=ExitCode.TIME_LIMIT,
                ) from None
            for old in list(self._captured)[1:-MOST_GRAPHS]:  # the job's own stays
                del self._captured[old]
        return self._captured[key]

    def _described(self, found: SearchResult) -> Verdict:
        candidate, predicted = found.candidate, found.predicted
        recomputed = found.memory_policy.recomputed(found.segments)
        return Verdict(
            True,
            peak_bytes=sum(predicted.memory.values()),
            limit_bytes=predicted.memory_limit_bytes - predicted.memory_margin_bytes,
            kept_free_bytes=predicted.memory_margin_bytes,
            memory_sure=predicted.memory_sure,
            memory=dict(predicted.memory),
            plan=f"{candidate}" + (f", recomputing in {', '.join(recomputed)}" if recomputed else ""),
            batch_ranks=candidate.batch_ranks,
            microbatch=candidate.microbatch,
            recomputes=bool(recomputed),
            host_bytes=predicted.host_bytes,
            step_s=predicted.step_s,
        )


def _refused(error: DoesNotFit) -> Verdict:
    candidate = error.nearest.candidate
    return Verdict(
        False,
        peak_bytes=error.peak_bytes,
        limit_bytes=error.limit_bytes,
        kept_free_bytes=error.kept_free_bytes,
        memory_sure=error.memory_sure,
        memory=error.memory,
        reason=f"{format_bytes(error.peak_bytes - error.limit_bytes)} missing",
        plan=str(candidate),
        batch_ranks=candidate.batch_ranks,
        microbatch=candidate.microbatch,
        recomputes=bool(error.nearest.recompute),
    )
