"""The outer search: mesh, microbatch, ZeRO stage, schedule, stage cuts and recomputation, scored by the simulator.

Candidates are taken in groups that share a sharding solution: equal tensor axis and equal sequences on a rank. A
group is solved only while the bound of its best candidate is below the incumbent. That bound needs no solution of its
own: an op never takes less than its share of the same op on the whole batch on one device, which is costed once.
Inside a group candidates go by their own bound (evaluate.lower_bound). For each the fastest of the memory options that
fits (memory_options.py) is found by bisection, then the best cuts, then the simulated step. The sharding frontier is
asked for where the fastest placements leave too little memory.

Two prunings are not proofs, and leave the certificate alone: a candidate that does not fit rules out those that
differ in a larger microbatch only, and interleaving is looked at only where an optimistic estimate of its bubble
beats the incumbent.

The certificate is the least bound over all candidates that are not known not to fit, scaled by what the sharding solver
left open. Ctrl-C and the time limit end the search with the incumbent and its gap.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..costmodel.model import CostModel
from ..errors import ExitCode, ShardwrightError
from ..profiler.cluster import Cluster
from ..profiler.graph import ModelGraph
from ..profiler.workload import Workload
from ..units import format_seconds
from .advice import does_not_fit
from .candidates import Candidate, Forced, check_forced, divisors, enumerate_candidates, nothing_divides, parse_forced
from .chain import Chain, build_chain
from .evaluate import (
    estimate,
    find_cuts,
    level_ranks,
    lower_bound,
    order_bound,
    path_seconds,
    step_seconds,
    unevenness,
)
from .footprint import fits, mean_bytes, quick_peaks
from .interfaces import Sharder, ShardingSolution
from .memory_options import MemoryOption, memory_options
from .outcome import Outcome
from .result import SearchResult, build_result
from .setting import Setting

Progress = Callable[[str], None]

BETTER = 1 - 1e-6  # a new incumbent is better by more than this
MAX_CHUNK_CHOICES = 4


@dataclass
class SearchState:
    """One search under way."""

    setting: Setting
    sharder: Sharder
    forced: Forced
    candidates: list[Candidate]
    deadline: float
    progress: Progress
    solutions: dict[tuple[int, int, int], ShardingSolution | None] = field(default_factory=dict)  # dp, tp, batch
    outcomes: dict[Candidate, Outcome] = field(default_factory=dict)
    incumbent: Outcome | None = None
    solve_seconds: float = 0.0
    whole_forward_s: float = 0.0  # of the whole batch on one device
    whole_backward_s: float = 0.0
    refusal: ShardwrightError | None = None  # the latest of the sharder's
    tolerance: float = BETTER  # of the incumbent's step: what is slower than this share of it is not looked at

    def run(self) -> str:
        """Returns what cut it short, or ''."""
        groups: dict[tuple[int, int], list[Candidate]] = {}
        for candidate in self.candidates:
            groups.setdefault((candidate.local_batch, candidate.tp), []).append(candidate)
        try:
            self._learn_whole()
            for _, members in sorted(groups.items()):
                self._run_group(members)
        except KeyboardInterrupt:
            return "Ctrl-C"
        except _TimeUp:
            return "time limit"
        return ""

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise _TimeUp

    def _learn_whole(self) -> None:
        """Seconds of the whole batch on one device, forward and backward: what the bounds of unsolved groups share
        out.
        """
        batch = self.setting.workload.global_batch
        solution = self.solve_for(1, 1, batch)
        if solution is None:
            return
        chain = build_chain(self.setting.graph, self.setting.shape, solution, frozenset())
        scale = min(min(self.setting.mesh(candidate).scales) for candidate in self.candidates[:1])
        self.whole_forward_s = float((chain.forward_s - chain.forward_comm_s).sum()) * scale
        self.whole_backward_s = float((chain.backward_s - chain.backward_comm_s).sum()) * scale

    def ideal_seconds(self, candidate: Candidate) -> float:
        """Step of this candidate without collectives, every op as efficient as on the whole batch."""
        parts = candidate.dp * candidate.tp * candidate.count
        forward_s, backward_s = self.whole_forward_s / parts, self.whole_backward_s / parts
        return path_seconds(candidate.schedule, forward_s, backward_s, candidate.pp, candidate.count)

    def _run_group(self, members: list[Candidate]) -> None:
        self.setting.forget()
        open_members = []
        for candidate in members:
            outcome = self.outcomes[candidate] = Outcome(candidate, bound_s=self.ideal_seconds(candidate))
            smaller = self._smaller_that_does_not_fit(candidate)
            if smaller is not None:
                outcome.fits, outcome.peak_bytes, outcome.limit_bytes = False, smaller.peak_bytes, smaller.limit_bytes
                outcome.missing_bytes, outcome.worst_rank = smaller.missing_bytes, smaller.worst_rank
                outcome.recompute, outcome.recompute_all = smaller.recompute, smaller.recompute_all
            elif self._may_win(outcome.bound_s):
                open_members.append(candidate)
        if not open_members:
            return
        self._check_time()
        first = min(open_members, key=self.ideal_seconds)
        solution = self.solve(first)
        if solution is None:
            for candidate in members:
                self.outcomes[candidate].unsharded = True
            return
        options = self._options([solution])
        if any(self._first_option(candidate, options) > 0 for candidate in open_members):
            options = self._options(self.frontier(first))
        chain = self.setting.chain(options[0].solution, options[0].recompute)
        ratio = solution.proven_share
        order = {}
        for candidate in open_members:
            outcome = self.outcomes[candidate]
            outcome.first_option = self._first_option(candidate, options)
            start = options[outcome.first_option]
            least = self.setting.chain(start.solution, start.recompute)
            outcome.search_bound_s = lower_bound(self.setting, candidate, least)
            outcome.bound_s = max(outcome.bound_s, outcome.search_bound_s * ratio)
            order[candidate] = estimate(self.setting, candidate, least)
        uneven = self._uneven_interleavings(open_members, chain)
        for candidate in sorted(open_members, key=lambda c: (_rounded(order[c]), *c.simplicity)):
            if candidate in uneven:
                self.outcomes[candidate].note = "chunks less even than with other virtual stages"
            elif self._may_win(order[candidate]):
                self._check_time()
                self._evaluate(candidate, options)
            elif self._may_win(self.outcomes[candidate].search_bound_s):
                self.outcomes[candidate].note = f"estimated at {format_seconds(order[candidate])} with its bubble"

    def _options(self, solutions: Sequence[ShardingSolution]) -> list[MemoryOption]:
        return memory_options(self.setting.shape, solutions, self.forced.recompute)

    def _first_option(self, candidate: Candidate, options: Sequence[MemoryOption]) -> int:
        """The fastest option under which the mean rank may fit; the leanest where it fits under none."""
        limit = self.setting.limits(candidate).max()
        for index, option in enumerate(options):
            chain = self.setting.chain(option.solution, option.recompute)
            if mean_bytes(self.setting, candidate, chain) <= limit:
                return index
        return len(options) - 1

    def _uneven_interleavings(self, members: list[Candidate], chain: Chain) -> set[Candidate]:
        """Interleaved candidates beyond the MAX_CHUNK_CHOICES numbers of virtual stages that promise most for their
        pp.
        """
        if self.forced.virtual_stages is not None:
            return set()
        left_out: set[Candidate] = set()
        by_mesh: dict[tuple[int, int], dict[int, list[Candidate]]] = {}
        for candidate in members:
            if candidate.virtual_stages > 1:
                chunks = by_mesh.setdefault((candidate.pp, candidate.count), {})
                chunks.setdefault(candidate.virtual_stages, []).append(candidate)
        for (pp, count), chunks in by_mesh.items():

            def promise(v: int, pp: int = pp, count: int = count) -> float:
                return count * unevenness(self.setting, chain, pp * v) + (pp - 1) / v

            for v in sorted(chunks, key=promise)[MAX_CHUNK_CHOICES:]:
                left_out.update(chunks[v])
        return left_out

    def _smaller_that_does_not_fit(self, candidate: Candidate) -> Outcome | None:
        """The same with a smaller microbatch, known not to fit: activations only grow with the microbatch."""
        for microbatch in divisors(candidate.microbatch)[:-1]:
            if microbatch % candidate.dp:
                continue
            count = candidate.count * candidate.microbatch // microbatch
            found = self.outcomes.get(replace(candidate, microbatch=microbatch, count=count))
            if found is not None and found.fits is False:
                return found
        return None

    def solve(self, candidate: Candidate) -> ShardingSolution | None:
        return self.solve_for(candidate.dp, candidate.tp, candidate.local_batch)

    def solve_for(self, dp: int, tp: int, local_batch: int) -> ShardingSolution | None:
        key = (dp, tp, local_batch)
        if key not in self.solutions:
            self.progress(f"sharding dp={dp} tp={tp}, {local_batch} sequences a rank")
            started = time.monotonic()
            try:
                self.solutions[key] = self.sharder.solve(dp=dp, tp=tp, local_batch=local_batch)
            except ShardwrightError as error:
                self.solutions[key], self.refusal = None, error
            self.solve_seconds += time.monotonic() - started
        return self.solutions[key]

    def frontier(self, candidate: Candidate) -> list[ShardingSolution]:
        self.progress(f"frontier of dp={candidate.dp} tp={candidate.tp}, {candidate.local_batch} sequences a rank")
        started = time.monotonic()
        found = self.sharder.frontier(dp=candidate.dp, tp=candidate.tp, local_batch=candidate.local_batch)
        self.solve_seconds += time.monotonic() - started
        return found

    def is_own(self, solution: ShardingSolution, candidate: Candidate) -> bool:
        """Was this solved for the candidate's own mesh?"""
        own = self.solve(candidate)
        return own is solution or any(found is solution for found in self.frontier(candidate))

    def _evaluate(self, candidate: Candidate, options: Sequence[MemoryOption]) -> None:
        outcome = self.score(candidate, options)
        if self._is_better(outcome):
            exact = self._exact_options(candidate, options)
            if exact is not options:
                outcome = self.score(candidate, exact)
            if self._is_better(outcome):
                self.incumbent = outcome
                self.progress(f"best so far {outcome.step_s:.3f} s: {candidate}")
        self.outcomes[candidate] = outcome

    def score_alone(self, candidate: Candidate) -> Outcome:
        """A candidate of its own, outside its group."""
        solution = self.solve(candidate)
        if solution is None:
            return self.outcomes[candidate]
        options = self._options([solution])
        if self._first_option(candidate, options) > 0:
            options = self._options(self.frontier(candidate))
        self.outcomes[candidate].first_option = self._first_option(candidate, options)
        return self.score(candidate, options)

    def _exact_options(self, candidate: Candidate, options: Sequence[MemoryOption]) -> Sequence[MemoryOption]:
        """The same for the candidate's own data-parallel degree, where the group was solved for another."""
        exact = self.solve(candidate)
        if exact is None or exact is options[0].solution:
            return options
        several = any(option.solution is not options[0].solution for option in options)
        return self._options(self.frontier(candidate) if several else [exact])

    def _may_win(self, at_least_s: float) -> bool:
        return self.incumbent is None or at_least_s < (self.incumbent.step_s or 0.0) * self.tolerance

    def _is_better(self, outcome: Outcome) -> bool:
        if outcome.step_s is None:
            return False
        return self._may_win(outcome.step_s)

    def score(self, candidate: Candidate, options: Sequence[MemoryOption]) -> Outcome:
        """Fastest option that fits; its cuts; its simulated step. Looks no further where that cannot win."""
        setting = self.setting
        outcome = self.outcomes[candidate]
        fitting: tuple[int, tuple[int, ...], float] | None = None
        low, high = min(outcome.first_option, len(options) - 1), len(options) - 1
        trial, slow_s = low, 0.0
        while low <= high:
            chain = setting.chain(options[trial].solution, options[trial].recompute)
            if not self._may_win(estimate(setting, candidate, chain)):
                # later options only take longer: what is left to try are earlier ones
                outcome.too_slow, high = True, trial - 1
                slow_s = lower_bound(setting, candidate, chain)
            else:
                cuts = self._cuts(candidate, chain)
                if cuts is not None:
                    fitting, high = (trial, *cuts), trial - 1
                else:
                    low = trial + 1
            # first none, then one step at a time where there are few, else halves
            trial = low if len(options) <= 4 else (low + high + 1) // 2
        if fitting is None and outcome.too_slow:
            outcome.search_bound_s = max(outcome.search_bound_s, slow_s)
            outcome.bound_s = max(outcome.bound_s, slow_s * options[0].solution.proven_share)
            return outcome
        if fitting is None:
            need = self._least_need(candidate, options[-1])
            outcome.missing_bytes, outcome.peak_bytes, outcome.worst_rank = need
            outcome.limit_bytes = setting.limit(candidate, outcome.worst_rank)
            outcome.fits, outcome.recompute = False, options[-1].recompute
            outcome.recompute_all = options[-1].recompute_all
            return outcome
        index, bounds, bottleneck = fitting
        chosen = options[index]
        chain = setting.chain(chosen.solution, chosen.recompute)
        if self.forced.cuts is None:
            bounds = level_ranks(setting, candidate, chain, bounds)
        outcome.fits = True
        outcome.peak_bytes = int(quick_peaks(setting, candidate, chain, bounds).max())
        at_least = order_bound(setting, candidate, chain, bounds)
        if not self._may_win(at_least):
            outcome.search_bound_s = max(outcome.search_bound_s, at_least)
            return outcome
        return Outcome(
            candidate,
            bound_s=max(outcome.bound_s, bottleneck * chosen.solution.proven_share),
            search_bound_s=outcome.search_bound_s,
            step_s=step_seconds(setting, candidate, chain, bounds),
            bounds=bounds,
            recompute=chosen.recompute,
            solution=chosen.solution,
            peak_bytes=outcome.peak_bytes,
            fits=True,
            recompute_all=chosen.recompute_all,
        )

    def _cuts(self, candidate: Candidate, chain: Chain) -> tuple[tuple[int, ...], float] | None:
        """(bounds, lower bound from the cuts or 0) where they fit."""
        setting = self.setting
        if self.forced.cuts is not None:
            place = {index: position for position, index in enumerate(setting.shape.instances)}
            missing = [cut for cut in self.forced.cuts if place.get(cut, 0) == 0]
            if missing:
                body = setting.shape.instances
                raise ShardwrightError(
                    f"--force cuts: no stage can begin at segment instance {missing[0]}",
                    means=f"stages begin at one of the instances {body[1]} to {body[-1]}",
                    change="--force cuts",
                    works=f"--force cuts={body[len(body) // 2]}",
                    exit_code=ExitCode.CONTRADICTION,
                )
            bounds = (0, *(place[cut] for cut in self.forced.cuts), chain.num_instances)
            bottleneck = 0.0
        else:
            cuts = find_cuts(setting, candidate, chain)
            if cuts is None:
                return None
            bounds = cuts.bounds
            bottleneck = cuts.bottleneck if candidate.schedule in ("gpipe", "1f1b") else 0.0
        if not fits(setting, candidate, chain, bounds):
            return None
        return bounds, bottleneck

    def _least_need(self, candidate: Candidate, leanest: MemoryOption) -> tuple[int, int, int]:
        """(missing bytes, peak of the worst rank, that rank) with the leanest option and even cuts."""
        chain = self.setting.chain(leanest.solution, leanest.recompute)
        cuts = find_cuts(self.setting, candidate, chain, ignore_memory=True)
        if cuts is None:
            return 0, 0, 0
        peaks = quick_peaks(self.setting, candidate, chain, cuts.bounds)
        lacking = peaks - self.setting.limits(candidate)
        worst = int(lacking.argmax())
        return max(int(lacking[worst]), 0), int(peaks[worst]), worst


def _rounded(seconds: float) -> float:
    """So that candidates of equal time go by simplicity, not by the last bit."""
    return float(f"{seconds:.9g}")


class _TimeUp(Exception):
    pass


def search(
    graph: ModelGraph,
    cluster: Cluster,
    cost_model: CostModel,
    workload: Workload,
    sharder: Sharder,
    *,
    force: Mapping[str, str],
    time_limit_s: float | None = None,
    memory_limit_bytes: int | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """The fastest plan that fits. memory_limit_bytes: per device, below what the cluster says.

    Raises ShardwrightError: unknown force key (2), contradiction or a batch that does not divide (4), nothing fits (3),
    time limit with no incumbent (6).
    """
    started = time.monotonic()
    setting = Setting(graph, cluster, cost_model, workload, memory_limit_bytes)
    forced = parse_forced(force)
    num_instances = len(setting.shape.instances)
    check_forced(forced, cluster, workload.global_batch, num_instances)
    space = (forced, cluster.num_devices, workload.global_batch, num_instances, _widest_tp(cluster), _domain(cluster))
    candidates = list(enumerate_candidates(*space))
    if not candidates:
        raise nothing_divides(*space)
    state = SearchState(
        setting=setting,
        sharder=sharder,
        forced=forced,
        candidates=candidates,
        deadline=started + time_limit_s if time_limit_s is not None else float("inf"),
        progress=progress or (lambda message: None),
    )
    interrupted = state.run()
    if state.incumbent is None:
        if interrupted:
            looked_at = sum(outcome.fits is not None for outcome in state.outcomes.values())
            raise ShardwrightError(
                f"{interrupted} after {time.monotonic() - started:.1f} s, before any plan was found",
                means=f"{looked_at} of {len(candidates)} candidates looked at",
                change="--time-limit",
                works=f"--time-limit {max(60, round(10 * (time_limit_s or 6)))}",
                exit_code=ExitCode.TIME_LIMIT,
            )
        if state.refusal is not None and all(outcome.unsharded for outcome in state.outcomes.values()):
            raise state.refusal
        raise does_not_fit(setting, forced, list(state.outcomes.values()), state.solutions, state.solve_for)
    try:
        return build_result(state, started, interrupted)
    except KeyboardInterrupt:  # while orders competed for the chosen mesh
        return build_result(state, started, "Ctrl-C")


def _domain(cluster: Cluster) -> int:
    """Devices that fast links join, the same everywhere; 1 where they differ or all hang on one network."""
    sizes = {group.devices_per_domain for group in cluster.groups}
    return sizes.pop() if len(sizes) == 1 and cluster.num_devices > min(sizes) else 1


def _widest_tp(cluster: Cluster) -> int:
    """The widest tensor axis tried: a fast domain, and at least 8."""
    return max(8, *(group.devices_per_domain for group in cluster.groups))
