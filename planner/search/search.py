"""The outer search: mesh, microbatch, ZeRO stage, schedule, stage cuts and recomputation, scored by the simulator.

Candidates are taken in groups that share a sharding solution: equal tensor axis and equal sequences on a rank. A
group is solved only while the bound of its best candidate is below the incumbent. That bound needs no solution of its
own: an op never takes less than its share of the same op on the whole batch on one device, which is costed once.
Inside a group candidates go by their own bound (step_time.lower_bound). Each is priced under all memory options that
could be its best (scoring.py): cuts, then the simulated step. The sharding frontier is asked for where the fastest
placements leave too little memory for their best cuts.

Those of which memory keeps the best from fitting are then looked at with the optimizer's state in host memory
(host_candidates.py).

Two prunings are not proofs, and leave the certificate alone: a candidate that does not fit rules out those that
differ in a larger microbatch only, and interleaving is looked at only where an optimistic estimate of its bubble
beats the incumbent.

The certificate (certificate.py) is the least bound over all candidates that are not known not to fit, scaled by what
the sharding solver left open. Ctrl-C and the time limit end the search with the incumbent and its gap.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ...costmodel.model import CostModel
from ...errors import ExitCode, ShardwrightError
from ...plans.axes import MeshShape
from ...profiler.cluster import Cluster
from ...profiler.graph import ModelGraph
from ...profiler.watch import TimeUp, stop_at
from ...profiler.workload import Workload
from ...units import format_seconds
from ..interfaces import Sharder
from ..sharding.expert_costs import most_experts
from ..space.candidates import Candidate, enumerate_candidates, nothing_divides, widest_sequence_axis
from ..space.forcing import check_forced, divisors, parse_forced
from ..stages.chain import NOTHING, Chain, build_chain
from ..stages.setting import Setting
from .certificate import base_of, ideal_seconds, learn_any_order, own_order_bound
from .chosen import choose
from .does_not_fit import does_not_fit
from .host_candidates import host_candidates
from .outcome import Outcome
from .result import SearchResult, build_result, tokens_per_sample
from .scoring import least_of_each, mean_fits, score_in_pool
from .stage_recompute import rungs_of
from .state import MemoryPool, Progress, SearchState
from .step_time import estimate, lower_bound, unevenness

MAX_CHUNK_CHOICES = 4
FIRST = "the first that fits"


class _Found(Exception):
    """The first plan that fits is there, and is enough."""


class _Search:
    """Goes through the candidates of a state, group by group."""

    def __init__(self, state: SearchState) -> None:
        self.state, self.setting = state, state.setting

    def run(self) -> str:
        """Returns what cut it short, or ''."""
        try:
            with stop_at(self.state.deadline):
                if not self.state.first_only:
                    self._learn_whole()
                self._run_groups(self.state.candidates)
                on_host = host_candidates(self.state)
                self.state.candidates.extend(on_host)
                self._run_groups(on_host)
        except KeyboardInterrupt:
            return "Ctrl-C"
        except TimeUp:
            return "time limit"
        except _Found:
            return FIRST
        return ""

    def _run_groups(self, candidates: Sequence[Candidate]) -> None:
        groups: dict[tuple[int, MeshShape], list[Candidate]] = {}
        for candidate in candidates:
            groups.setdefault((candidate.local_batch, candidate.mesh.inner_part), []).append(candidate)
        for _, members in sorted(groups.items()):
            self._run_group(members)

    def _check_time(self) -> None:
        if time.monotonic() > self.state.deadline:
            raise TimeUp

    def _learn_whole(self) -> None:
        """Seconds of the whole batch on one device, forward and backward: what the bounds of unsolved groups share
        out.
        """
        batch = self.setting.workload.global_batch
        solution = self.state.solve_for(MeshShape.of(), batch)
        if solution is None:
            return
        chain = build_chain(self.setting.graph, self.setting.shape, solution, NOTHING)
        scale = min(min(self.setting.mesh(candidate).scales) for candidate in self.state.candidates[:1])
        self.state.whole_forward_s = (chain.forward_s - chain.forward_comm_s) * scale
        self.state.whole_backward_s = (chain.backward_s - chain.backward_comm_s) * scale

    def _run_group(self, members: list[Candidate]) -> None:
        self.setting.forget()
        open_members = []
        for candidate in members:
            ideal_s = ideal_seconds(self.state, candidate, candidate.schedule)
            outcome = self.state.learn(candidate, bound_s=ideal_s)
            smaller = self._smaller_that_does_not_fit(candidate)
            if smaller is not None:
                self._take_for_too_large(candidate, smaller)
            elif self.state.may_win(outcome.bound_s):
                open_members.append(candidate)
        if not open_members:
            return
        self._check_time()
        first = min(open_members, key=lambda candidate: self.state.outcomes[candidate].bound_s)
        solution = self.state.solve(first)
        if solution is None:
            for candidate in members:
                self.state.learn(candidate, unsharded=True, bound_s=math.inf)
                self.state.any_order_s[base_of(candidate)] = math.inf
            return
        pool = self.state.pool(first, solution)
        if not all(mean_fits(self.state, candidate, pool.ladders[0]) for candidate in open_members):
            self.state.widen(pool)
        chain = rungs_of(self.setting, pool.ladders[0])[0]
        order = {candidate: self._learn_bounds(candidate, pool) for candidate in open_members}
        for base in {base_of(candidate) for candidate in open_members}:
            learn_any_order(self.state, base, pool)
        uneven = self._uneven_interleavings(open_members, chain)
        for candidate in sorted(open_members, key=lambda c: (_rounded(order[c]), *c.simplicity)):
            if candidate in uneven:
                self.state.learn(candidate, note="chunks less even than with other virtual stages")
            elif self.state.may_win(order[candidate]):
                self._check_time()
                self._evaluate(candidate, pool)
            elif self.state.may_win(self.state.outcomes[candidate].search_bound_s):
                self.state.learn(candidate, note=f"estimated at {format_seconds(order[candidate])} with its bubble")

    def _learn_bounds(self, candidate: Candidate, pool: MemoryPool) -> float:
        """Bounds of a candidate of a solved group; returns what it is estimated at."""
        found = least_of_each(self.state, candidate, pool.ladders)
        chains = [least for _, least in found] or [rungs_of(self.setting, pool.ladders[-1])[-1]]
        proven_s = max(self.state.outcomes[candidate].bound_s, own_order_bound(self.state, candidate, found))
        search_bound_s = min(lower_bound(self.setting, candidate, chain) for chain in chains)
        self.state.learn(candidate, search_bound_s=search_bound_s, bound_s=proven_s)
        return min(estimate(self.setting, candidate, chain) for chain in chains)

    def _take_for_too_large(self, candidate: Candidate, smaller: Outcome) -> None:
        self.state.learn(
            candidate,
            assumed=True,
            fits=False,
            peak_bytes=smaller.peak_bytes,
            limit_bytes=smaller.limit_bytes,
            missing_bytes=smaller.missing_bytes,
            worst_rank=smaller.worst_rank,
            recompute=smaller.recompute,
            recompute_all=smaller.recompute_all,
            bound_s=math.inf if smaller.bound_s == math.inf else self.state.outcomes[candidate].bound_s,
        )
        if self.state.any_order_s.get(base_of(smaller.candidate)) == math.inf:
            self.state.any_order_s[base_of(candidate)] = math.inf

    def _uneven_interleavings(self, members: list[Candidate], chain: Chain) -> set[Candidate]:
        """Interleaved candidates beyond the MAX_CHUNK_CHOICES numbers of virtual stages that promise most for their
        pp.
        """
        if self.state.forced.virtual_stages is not None:
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
            if microbatch % candidate.batch_ranks:
                continue
            count = candidate.count * candidate.microbatch // microbatch
            found = self.state.outcomes.get(replace(candidate, microbatch=microbatch, count=count))
            if found is not None and found.fits is False and (candidate.count > 1 or count == 1):
                return found
        return None

    def _evaluate(self, candidate: Candidate, pool: MemoryPool) -> None:
        outcome = score_in_pool(self.state, candidate, pool)
        if self.state.is_better(outcome):
            exact = self._exact_pool(candidate, pool)
            if exact is not pool:
                outcome = score_in_pool(self.state, candidate, exact)
            if self.state.is_better(outcome):
                self.state.incumbent = outcome
                self.state.progress(f"best so far {outcome.step_s:.3f} s: {candidate}")
                if self.state.first_only:
                    raise _Found
        self.state.record(outcome)
        if candidate.pp == 1:  # there is no other order
            self.state.any_order_s[base_of(candidate)] = outcome.bound_s

    def _exact_pool(self, candidate: Candidate, pool: MemoryPool) -> MemoryPool:
        """The same for the candidate's own data-parallel degree, where the group was solved for another."""
        exact = self.state.solve(candidate)
        if exact is None or exact is pool.ladders[0].solution:
            return pool
        own = self.state.pool(candidate, exact)
        if pool.widened:
            self.state.widen(own)
        return own


def _rounded(seconds: float) -> float:
    """So that candidates of equal time go by simplicity, not by the last bit."""
    return float(f"{seconds:.9g}")


def search(
    graph: ModelGraph,
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
    setting = Setting(graph, cost_model.cluster, cost_model, workload, memory_limit_bytes)
    return _run(_begin(setting, sharder, force, time_limit_s, progress))


def first_that_fits(
    graph: ModelGraph,
    cost_model: CostModel,
    workload: Workload,
    sharder: Sharder,
    *,
    force: Mapping[str, str],
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """A plan that fits, whatever time it takes. Raises what search does; where nothing fits, no change is suggested."""
    setting = Setting(graph, cost_model.cluster, cost_model, workload)
    state = _begin(setting, sharder, force, time_limit_s, progress)
    state.first_only = True
    return _run(state)


def _begin(
    setting: Setting,
    sharder: Sharder,
    force: Mapping[str, str],
    time_limit_s: float | None,
    progress: Progress | None,
) -> SearchState:
    started, cluster, workload = time.monotonic(), setting.cluster, setting.workload
    forced = parse_forced(force)
    num_instances = len(setting.shape.instances)
    num_experts = most_experts(setting.graph)
    check_forced(forced, cluster, workload.global_batch, num_instances, num_experts)
    setting.memory_margin = forced.memory_margin
    space = (
        forced,
        cluster.num_devices,
        workload.global_batch,
        num_instances,
        _widest_tensor_axis(cluster),
        _domain(cluster),
        widest_sequence_axis(tokens_per_sample(workload), cluster.num_devices),
        num_experts,
    )
    candidates = list(enumerate_candidates(*space))
    if not candidates:
        raise nothing_divides(*space)
    return SearchState(
        setting=setting,
        sharder=sharder,
        forced=forced,
        candidates=candidates,
        deadline=started + time_limit_s if time_limit_s is not None else float("inf"),
        progress=progress or (lambda message: None),
        started=started,
    )


def _run(state: SearchState) -> SearchResult:
    started = state.started
    interrupted = _Search(state).run()
    if state.incumbent is None:
        if interrupted:
            limit_s = state.deadline - started
            looked_at = sum(outcome.fits is not None for outcome in state.outcomes.values())
            raise ShardwrightError(
                f"{interrupted} after {time.monotonic() - started:.1f} s, before any plan was found",
                means=f"{looked_at} of {len(state.candidates)} candidates looked at",
                change="--time-limit",
                works=f"--time-limit {max(60, round(10 * limit_s)) if limit_s < math.inf else 60}",
                exit_code=ExitCode.TIME_LIMIT,
            )
        if state.refusal is not None and all(outcome.unsharded for outcome in state.outcomes.values()):
            raise state.refusal
        raise does_not_fit(state)
    if interrupted:
        return _result(state, started, interrupted)
    try:
        with stop_at(state.deadline):
            return _result(state, started, "")
    except KeyboardInterrupt:  # while orders competed for the chosen mesh
        return _result(state, started, "Ctrl-C")
    except TimeUp:
        return _result(state, started, "time limit")


def _result(state: SearchState, started: float, interrupted: str) -> SearchResult:
    return build_result(state, choose(state, interrupted), started, interrupted)


def _domain(cluster: Cluster) -> int:
    """Devices that fast links join, the same everywhere; 1 where they differ or all hang on one network."""
    sizes = {group.devices_per_domain for group in cluster.groups}
    return sizes.pop() if len(sizes) == 1 and cluster.num_devices > min(sizes) else 1


def _widest_tensor_axis(cluster: Cluster) -> int:
    """The widest tensor axis tried: a fast domain, and at least 8."""
    return max(8, *(group.devices_per_domain for group in cluster.groups))
