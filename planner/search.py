"""The outer search: mesh, microbatch, ZeRO stage, schedule, stage cuts and recomputation, scored by the simulator.

Candidates are taken in groups that share a sharding solution: equal tensor axis and equal sequences on a rank. A
group is solved only while the bound of its best candidate is below the incumbent. That bound needs no solution of its
own: an op never takes less than its share of the same op on the whole batch on one device, which is costed once.
Inside a group candidates go by their own bound (evaluate.lower_bound). Each is priced under all memory options that
could be its best (scoring.py): cuts, then the simulated step. The sharding frontier is asked for where the fastest
placements leave too little memory for their best cuts.

Two prunings are not proofs, and leave the certificate alone: a candidate that does not fit rules out those that
differ in a larger microbatch only, and interleaving is looked at only where an optimistic estimate of its bubble
beats the incumbent.

The certificate (certificate.py) is the least bound over all candidates that are not known not to fit, scaled by what
the sharding solver left open. Ctrl-C and the time limit end the search with the incumbent and its gap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..costmodel.model import CostModel
from ..errors import ExitCode, ShardwrightError
from ..profiler.cluster import Cluster
from ..profiler.graph import ModelGraph
from ..profiler.watch import TimeUp, stop_at
from ..profiler.workload import Workload
from ..units import format_seconds
from .advice import does_not_fit
from .candidates import Candidate, enumerate_candidates, nothing_divides
from .certificate import any_order_bound, base_of, ideal_seconds, own_order_bound
from .chain import Chain, build_chain
from .evaluate import estimate, lower_bound, unevenness
from .footprint import state_share
from .forcing import Forced, check_forced, divisors, parse_forced
from .interfaces import Sharder, ShardingSolution
from .memory_options import MemoryOption, memory_options
from .outcome import Outcome
from .result import SearchResult, build_result
from .scoring import first_options, mean_fits, score
from .setting import Setting

Progress = Callable[[str], None]

BETTER = 1 - 1e-6  # a new incumbent is better by more than this
MAX_CHUNK_CHOICES = 4
LEAST_GAIN = 1.01  # of a step over its bound for which other placements are asked for


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
    any_order_s: dict[Candidate, float] = field(default_factory=dict)  # of each certificate.base_of
    tolerance: float = BETTER  # of the incumbent's step: what is slower than this share of it is not looked at

    def run(self) -> str:
        """Returns what cut it short, or ''."""
        groups: dict[tuple[int, int], list[Candidate]] = {}
        for candidate in self.candidates:
            groups.setdefault((candidate.local_batch, candidate.tp), []).append(candidate)
        try:
            with stop_at(self.deadline):
                self._learn_whole()
                for _, members in sorted(groups.items()):
                    self._run_group(members)
        except KeyboardInterrupt:
            return "Ctrl-C"
        except TimeUp:
            return "time limit"
        return ""

    def _check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise TimeUp

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

    def _run_group(self, members: list[Candidate]) -> None:
        self.setting.forget()
        open_members = []
        for candidate in members:
            outcome = self.outcomes[candidate] = Outcome(
                candidate, bound_s=ideal_seconds(self, candidate, candidate.schedule)
            )
            smaller = self._smaller_that_does_not_fit(candidate)
            if smaller is not None:
                self._take_for_too_large(outcome, smaller)
            elif self.may_win(outcome.bound_s):
                open_members.append(candidate)
        if not open_members:
            return
        self._check_time()
        first = min(open_members, key=lambda candidate: self.outcomes[candidate].bound_s)
        solution = self.solve(first)
        if solution is None:
            for candidate in members:
                self.outcomes[candidate].unsharded = True
                self.outcomes[candidate].bound_s = self.any_order_s[base_of(candidate)] = math.inf
            return
        pool = self.pool(first, solution)
        if not all(mean_fits(self, candidate, pool.options[0]) for candidate in open_members):
            self.widen(pool)
        chain = self.setting.chain(pool.options[0].solution, pool.options[0].recompute)
        order = {candidate: self._learn_bounds(candidate, pool) for candidate in open_members}
        for base in {base_of(candidate) for candidate in open_members}:
            self.learn_any_order(base, pool)
        uneven = self._uneven_interleavings(open_members, chain)
        for candidate in sorted(open_members, key=lambda c: (_rounded(order[c]), *c.simplicity)):
            if candidate in uneven:
                self.outcomes[candidate].note = "chunks less even than with other virtual stages"
            elif self.may_win(order[candidate]):
                self._check_time()
                self._evaluate(candidate, pool)
            elif self.may_win(self.outcomes[candidate].search_bound_s):
                self.outcomes[candidate].note = f"estimated at {format_seconds(order[candidate])} with its bubble"

    def _learn_bounds(self, candidate: Candidate, pool: MemoryPool) -> float:
        """Bounds of a candidate of a solved group; returns what it is estimated at."""
        outcome = self.outcomes[candidate]
        firsts = first_options(self, candidate, pool.options)
        starts = firsts or pool.options[-1:]
        chains = [self.setting.chain(option.solution, option.recompute) for option in starts]
        outcome.search_bound_s = min(lower_bound(self.setting, candidate, chain) for chain in chains)
        outcome.bound_s = max(outcome.bound_s, own_order_bound(self, candidate, firsts))
        return min(estimate(self.setting, candidate, chain) for chain in chains)

    def _take_for_too_large(self, outcome: Outcome, smaller: Outcome) -> None:
        outcome.assumed = True
        outcome.fits, outcome.peak_bytes, outcome.limit_bytes = False, smaller.peak_bytes, smaller.limit_bytes
        outcome.missing_bytes, outcome.worst_rank = smaller.missing_bytes, smaller.worst_rank
        outcome.recompute, outcome.recompute_all = smaller.recompute, smaller.recompute_all
        if smaller.bound_s == math.inf:
            outcome.bound_s = math.inf
        if self.any_order_s.get(base_of(smaller.candidate)) == math.inf:
            self.any_order_s[base_of(outcome.candidate)] = math.inf

    def learn_any_order(self, base: Candidate, pool: MemoryPool) -> None:
        bound_s = any_order_bound(self, base, pool.options)
        self.any_order_s[base] = max(ideal_seconds(self, base, ""), bound_s)

    def pool(self, candidate: Candidate, solution: ShardingSolution) -> MemoryPool:
        return MemoryPool(candidate, self._options([solution]))

    def _options(self, solutions: Sequence[ShardingSolution]) -> list[MemoryOption]:
        return memory_options(self.setting.shape, solutions, self.forced.recompute)

    def widen(self, pool: MemoryPool) -> bool:
        """Ask for placements that keep less; was that of any use?"""
        if pool.widened:
            return False
        pool.widened = True
        solutions = self.frontier(pool.solved_for)
        pool.options = self._options(solutions)
        return len(solutions) > 1

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
        """The same with a smaller microbatch, known not to fit: activations only grow with the microbatch. One
        microbatch alone accumulates no gradients, and may fit where two do not."""
        for microbatch in divisors(candidate.microbatch)[:-1]:
            if microbatch % candidate.dp:
                continue
            count = candidate.count * candidate.microbatch // microbatch
            found = self.outcomes.get(replace(candidate, microbatch=microbatch, count=count))
            if found is not None and found.fits is False and (candidate.count > 1 or count == 1):
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
                if error.exit_code == ExitCode.TIME_LIMIT and time.monotonic() > self.deadline:
                    raise TimeUp from None
                self.solutions[key], self.refusal = None, error
            self.solve_seconds += time.monotonic() - started
        return self.solutions[key]

    def frontier(self, candidate: Candidate) -> list[ShardingSolution]:
        self.progress(f"frontier of dp={candidate.dp} tp={candidate.tp}, {candidate.local_batch} sequences a rank")
        started = time.monotonic()
        try:
            found = self.sharder.frontier(dp=candidate.dp, tp=candidate.tp, local_batch=candidate.local_batch)
        except ShardwrightError as error:
            if error.exit_code == ExitCode.TIME_LIMIT and time.monotonic() > self.deadline:
                raise TimeUp from None
            raise
        self.solve_seconds += time.monotonic() - started
        return found

    def is_own(self, solution: ShardingSolution, candidate: Candidate) -> bool:
        """Was this solved for the candidate's own mesh?"""
        own = self.solve(candidate)
        return own is solution or any(found is solution for found in self.frontier(candidate))

    def _evaluate(self, candidate: Candidate, pool: MemoryPool) -> None:
        outcome = self._score(candidate, pool)
        if self._is_better(outcome):
            exact = self._exact_pool(candidate, pool)
            if exact is not pool:
                outcome = self._score(candidate, exact)
            if self._is_better(outcome):
                self.incumbent = outcome
                self.progress(f"best so far {outcome.step_s:.3f} s: {candidate}")
        self.outcomes[candidate] = outcome
        if candidate.pp == 1:  # there is no other order
            self.any_order_s[base_of(candidate)] = outcome.bound_s

    def score_alone(self, candidate: Candidate) -> Outcome:
        """A candidate of its own, outside its group."""
        solution = self.solve(candidate)
        if solution is None:
            return self.outcomes[candidate]
        return self._score(candidate, self.pool(candidate, solution))

    def _score(self, candidate: Candidate, pool: MemoryPool) -> Outcome:
        """Placements that keep less are asked for where the fastest cannot have their best cuts."""
        outcome = self._score_pool(candidate, pool)
        return self._score_leanest(candidate, pool) if outcome.fits is False else outcome

    def _score_pool(self, candidate: Candidate, pool: MemoryPool) -> Outcome:
        outcome = score(self, candidate, pool.options)
        if not outcome.tight or pool.widened:
            return outcome
        fastest = self.setting.chain(pool.options[0].solution, pool.options[0].recompute)
        worth_s = LEAST_GAIN * lower_bound(self.setting, candidate, fastest)
        if (outcome.step_s is None or outcome.step_s > worth_s) and self.may_win(worth_s) and self.widen(pool):
            return score(self, candidate, pool.options)
        return outcome

    def _score_leanest(self, candidate: Candidate, pool: MemoryPool) -> Outcome:
        """Before a candidate is said not to fit: placements of least bytes in its own proportion of state."""
        if candidate.tp > 1 and pool.widened:
            own, share = pool.solved_for, state_share(self.setting, candidate)
            found = self.sharder.leanest(dp=own.dp, tp=own.tp, local_batch=own.local_batch, state_share=share)
            solutions = {id(option.solution): option.solution for option in pool.options}
            if found is not None and id(found) not in solutions:
                options = self._options([*solutions.values(), found])
                if any(option.solution is found for option in options):
                    pool.options = options
                    return score(self, candidate, options)
        return self.outcomes[candidate]

    def _exact_pool(self, candidate: Candidate, pool: MemoryPool) -> MemoryPool:
        """The same for the candidate's own data-parallel degree, where the group was solved for another."""
        exact = self.solve(candidate)
        if exact is None or exact is pool.options[0].solution:
            return pool
        own = self.pool(candidate, exact)
        if pool.widened:
            self.widen(own)
        return own

    def may_win(self, at_least_s: float) -> bool:
        return self.incumbent is None or at_least_s < (self.incumbent.step_s or 0.0) * self.tolerance

    def _is_better(self, outcome: Outcome) -> bool:
        if outcome.step_s is None:
            return False
        return self.may_win(outcome.step_s)


@dataclass
class MemoryPool:
    """The memory options of a group. solved_for: the candidate whose sharding they have. widened: the frontier was
    asked for."""

    solved_for: Candidate
    options: list[MemoryOption]
    widened: bool = False


def _rounded(seconds: float) -> float:
    """So that candidates of equal time go by simplicity, not by the last bit."""
    return float(f"{seconds:.9g}")


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
    if interrupted:
        return build_result(state, started, interrupted)
    try:
        with stop_at(state.deadline):
            return build_result(state, started, "")
    except KeyboardInterrupt:  # while orders competed for the chosen mesh
        return build_result(state, started, "Ctrl-C")
    except TimeUp:
        return build_result(state, started, "time limit")


def _domain(cluster: Cluster) -> int:
    """Devices that fast links join, the same everywhere; 1 where they differ or all hang on one network."""
    sizes = {group.devices_per_domain for group in cluster.groups}
    return sizes.pop() if len(sizes) == 1 and cluster.num_devices > min(sizes) else 1


def _widest_tp(cluster: Cluster) -> int:
    """The widest tensor axis tried: a fast domain, and at least 8."""
    return max(8, *(group.devices_per_domain for group in cluster.groups))
