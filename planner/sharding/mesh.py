"""The mesh that a model is sharded over, with what the solver must know of it: sizes of tensors, seconds, bytes.

Graphs are captured with a batch whose size divides no other dimension, so that a dimension that carries the batch is
told by its size; here such dimensions get the size that they have in the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import fx

from ...ops.expert_rules import is_dispatch, makes_again
from ...ops.lowering import LOWERINGS, cuts_again, may_run_at_once
from ...ops.placement import INFINITE, P, Places, R, can_shard, route, shares, transition
from ...ops.strategy import HEADS, Strategy
from ...plans.axes import AxisRole, Carries
from ...profiler.expert_ops import WEIGHTS

ANY = AxisRole("any", Carries.FEATURES, "splits what it can")
TIE_BREAK_S_PER_BYTE = 1e-16  # of two equal choices, the one that leaves fewer bytes on a rank


@dataclass(frozen=True)
class Axis:
    """collective_s: kind, bytes of the tensor whole on this axis -> seconds. role: one that carries the batch splits
    dimensions that do and no others, and each op that can runs on its shard of the batch; where parameters are whole on
    it, ZeRO shards them outside the graph. hops: where tokens go to experts by their hosts, (ranks that a token goes to
    some of, ranks that send to each other, their collective_s) of each hop.
    """

    name: str
    size: int
    collective_s: Callable[[str, float], float]
    role: AxisRole = ANY
    hops: tuple[tuple[int, int, Callable[[str, float], float]], ...] = ()


class Sizes(NamedTuple):
    """Of a whole tensor in the run. batched: which dimensions carry the batch. tokens: which may be a sequence's, alone
    or together with the samples. of_experts: is it made of parameters that experts alone read?"""

    shape: tuple[int, ...]
    batched: tuple[bool, ...]
    num_bytes: float
    partial: bool  # may be a partial sum
    tokens: tuple[bool, ...] = ()
    of_experts: bool = False


def _no_scratch(node: fx.Node, share: float, bytes_of: Callable[[fx.Node], float]) -> tuple[float, float]:
    return 0.0, 0.0


@dataclass
class Mesh:
    """batch: captured. run_batch: of one microbatch, over all data ranks. op_s: node, share of the captured op's flops,
    bytes moved -> seconds. memory_s: bytes -> seconds of a local copy. scratch_of: node, share, bytes of an operand on
    a rank -> bytes that the op holds while it runs, and bytes that it leaves for the next. state_of: elements, their
    bytes, whether they are trained -> bytes of training state. sum_all_s: axes (one bool each), elements -> seconds of
    the step's sum of their gradients; None: not counted. lengths: of the model's sequences. kept_whole: the same, where
    axes that carry features divide no tokens, no samples and nothing that passes between segments.
    weighs_vectors: do biases and the like count as training state? tie_break: seconds that a
    byte of an op's results is worth. attention: its form on axes that cut sequences. experts: their form on axes that
    may cut them; imbalance: work of the rank with most tokens over the mean; expert_chunks: in which tokens go to them;
    expert_results: tensors that hold experts.
    dispatch_s: that the host takes to start an op, ahead of the device. on_cpu: as CPUs run the programs.
    """

    axes: tuple[Axis, ...]
    batch: int
    run_batch: int
    op_s: Callable[[fx.Node, float, float], float]
    memory_s: Callable[[float], float]
    state_of: Callable[[float, float, bool], float] = lambda elements, num_bytes, is_trained: num_bytes
    sum_all_s: Callable[[tuple[bool, ...], float], float] | None = None
    scratch_of: Callable[[fx.Node, float, Callable[[fx.Node], float]], tuple[float, float]] = _no_scratch
    lengths: frozenset[int] = frozenset()
    kept_whole: frozenset[int] | None = None
    weighs_vectors: bool = True
    tie_break: float = TIE_BREAK_S_PER_BYTE
    attention: str = "auto"
    experts: str = "auto"
    imbalance: float = 1.0
    expert_chunks: int = 1
    expert_results: frozenset[tuple[fx.Node, int]] = frozenset()
    dispatch_s: float = 0.0
    on_cpu: bool = False
    _sizes: dict[tuple[int, int], Sizes] = field(default_factory=dict)
    _shares: dict[Places, int] = field(default_factory=dict)
    _transfers: dict[tuple[tuple[int, ...], float, Places, Places], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = tuple(axis.size for axis in self.axes)

    # ------------------------------------------------------------------ sizes

    def sizes(self, node: fx.Node, output: int = 0) -> Sizes:
        key = (id(node), output)
        if key not in self._sizes:
            val = node.meta["val"]
            tensor = val[output] if isinstance(val, (tuple, list)) else val
            known = isinstance(tensor, torch.Tensor)
            sizes = self.measure(tensor.shape, tensor.dtype) if known else Sizes((), (), 0.0, False)
            self._sizes[key] = sizes._replace(of_experts=(node, output) in self.expert_results)
        return self._sizes[key]

    def measure(self, captured: torch.Size, dtype: torch.dtype) -> Sizes:
        shape = tuple(captured)
        batched = tuple(self.batch > 1 and size % self.batch == 0 and size > 0 for size in shape)
        sizes = tuple(s // self.batch * self.run_batch if b else s for s, b in zip(shape, batched, strict=True))
        num_bytes = float(math.prod(sizes) * dtype.itemsize)
        tokens = tuple(self._is_of_tokens(s, b) for s, b in zip(shape, batched, strict=True)) if self.lengths else ()
        return Sizes(sizes, batched, num_bytes, dtype.is_floating_point, tokens)

    def _is_of_tokens(self, size: int, is_batched: bool) -> bool:
        """May a dimension be a sequence's? One that carries the batch may hold several things of each token."""
        each = size // self.batch if is_batched else size
        return size in self.lengths or (is_batched and each > 1 and any(each % s == 0 for s in self.lengths if s > 1))

    def shares(self, places: Places) -> int:
        """How many times smaller than the whole tensor one rank's part is."""
        if places not in self._shares:
            self._shares[places] = shares(places, self.counts)
        return self._shares[places]

    def local_bytes(self, node: fx.Node, output: int, places: Places) -> float:
        if makes_again(node, output, places):
            return 0.0
        return self.sizes(node, output).num_bytes / self.shares(places)

    def moved_bytes(self, node: fx.Node, option: Sequence[Strategy], results: Sequence[Sizes]) -> float:
        """That the op writes on a rank: of what is a partial sum because the backward makes it again, its part."""
        moved = 0.0
        for k, sizes in enumerate(results):
            if sizes.num_bytes:
                places = tuple(s.outputs[k] for s in option)
                if makes_again(node, k, places):
                    places = tuple(0 if p == P else p for p in places)
                moved += sizes.num_bytes / self.shares(places)
        return moved

    def may_split(self, sizes: Sizes, dim: int, axis: Axis, even: bool = False) -> bool:
        if axis.role.carries_batch and not sizes.batched[dim]:
            return axis.role.cuts_experts and sizes.of_experts and can_shard(sizes.shape[dim], axis.size, even)
        if axis.role.carries_sequence and not (sizes.tokens and sizes.tokens[dim]):
            return False
        if self.kept_whole is not None and axis.role.carries_features and self._is_row(sizes, dim):
            return False
        return can_shard(sizes.shape[dim], axis.size, even)

    def _is_row(self, sizes: Sizes, dim: int) -> bool:
        """Does a dimension count samples, or tokens? Of several of a sequence's length the first does, unless tokens
        are counted together with samples."""
        if sizes.batched[dim] or not any(sizes.batched):
            return sizes.batched[dim]
        assert self.kept_whole is not None
        each = [size // self.run_batch for size, batched in zip(sizes.shape, sizes.batched, strict=True) if batched]
        if any(size % length == 0 for size in each for length in self.kept_whole):
            return False
        return dim == next((d for d, size in enumerate(sizes.shape) if size in self.kept_whole), None)

    def domain(self, sizes: Sizes, *, partial: bool, is_param: bool = False) -> list[Places]:
        """Every way in which a tensor may lie."""
        choices = []
        for axis in self.axes:
            here = [R] + ([P] if partial and sizes.partial else [])
            here += [d for d, s in enumerate(sizes.shape) if s > 1 and self.may_split(sizes, d, axis)]
            is_whole = is_param and axis.role.params_whole and not (axis.role.cuts_experts and sizes.of_experts)
            choices.append([R] if axis.size == 1 or is_whole else here)
        return self._joint(sizes, choices)

    def between(self, sizes: Sizes, *, partial: bool) -> list[Places]:
        """Every way in which a tensor may pass from one segment to another."""
        found = self.domain(sizes, partial=partial)
        if self.kept_whole is None:
            return found
        cut = [axis.role.carries_features for axis in self.axes]
        return [places for places in found if not any(c and p >= 0 for c, p in zip(cut, places, strict=True))]

    def among(self, sizes: Sizes, used: Sequence[Collection[int]]) -> list[Places]:
        """Every way in which it may lie with these placements on each axis."""
        order = [R, P, *range(len(sizes.shape))]
        return self._joint(sizes, [[p for p in order if p in here] for here in used])

    def _joint(self, sizes: Sizes, choices: Sequence[Sequence[int]]) -> list[Places]:
        found: list[Places] = [()]
        for here in choices:
            found = [(*places, p) for places in found for p in here if self._may_follow(sizes.shape, places, p)]
        return found

    def _may_follow(self, shape: Sequence[int], places: Places, place: int) -> bool:
        """May the next axis have this placement? Axes of one kind may cut one dimension, each what those before it
        left, in equal parts; others each have their own."""
        own = self.axes[len(places)]
        others = [axis for axis, p in zip(self.axes, places, strict=False) if p == place >= 0]
        if not others:
            return True
        parts = math.prod(axis.size for axis in (*others, own))
        return all(axis.role.shares_dimensions_with(own.role) for axis in others) and shape[place] % parts == 0

    # ------------------------------------------------------------------ strategies

    def fitting(
        self,
        axis: Axis,
        listed: Sequence[Strategy],
        operands: Sequence[Sizes],
        results: Sequence[Sizes],
        is_view: bool = False,
    ) -> list[Strategy]:
        """Those of an op's strategies that the axis may run. Views of tokens may also carry heads, which attention
        takes, so that what the forward exchanged for them is there for the backward's views."""
        if axis.size == 1:
            return [listed[0]]
        if axis.role.allows is not None:
            listed = [s for s in listed if axis.role.allows(s)] or [listed[0]]
        tensors = [*operands, *results]
        if not axis.role.carries_sequence:
            listed = [s for s in listed if not s.of_sequence]
        if not axis.role.cuts_experts or not _may_dispatch(operands):
            listed = [s for s in listed if not s.of_experts]
        anywhere = axis.role.carries_sequence and is_view and any(operands[0].tokens)

        def fits(strategy: Strategy) -> bool:
            places = zip((*strategy.inputs, *strategy.outputs), tensors, strict=True)
            if strategy.of_sequence == HEADS or anywhere:
                return all(p < 0 or can_shard(t.shape[p], axis.size, strategy.even) for p, t in places)
            return all(p < 0 or not t.shape or self.may_split(t, p, axis, strategy.even) for p, t in places)

        def on_its_batch(strategy: Strategy) -> bool:
            places = zip((*strategy.inputs, *strategy.outputs), tensors, strict=True)
            return strategy.of_experts or all(p >= 0 for p, t in places if any(t.batched))

        found = [s for s in listed if fits(s)]
        return ([s for s in found if on_its_batch(s)] if axis.role.carries_batch else []) or found

    def joins(self, before: Sequence[Strategy], strategy: Strategy, tensors: Sequence[Sizes]) -> bool:
        """May the next axis run this strategy of an op, beside those of the axes before it? tensors: the op's operands
        and results."""
        role = self.axes[len(before)].role
        shared = [axis.role.shares_dimensions_with(role) for axis in self.axes[: len(before)]]
        if not all(compatible(b, strategy, s) for b, s in zip(before, shared, strict=True)):
            return False
        if strategy.inside and not self._is_inside(before, strategy, tensors[0], tensors[-1]):
            return False
        if not any(shared):
            return True
        rows = [(*b.inputs, *b.outputs) for b in before]
        places = zip((*strategy.inputs, *strategy.outputs), tensors, strict=True)
        return all(
            self._may_follow(sizes.shape, tuple(row[k] for row in rows), place)
            for k, (place, sizes) in enumerate(places)
            if place >= 0
        )

    def _is_inside(self, before: Sequence[Strategy], strategy: Strategy, operand: Sizes, result: Sizes) -> bool:
        """Do the axes before it leave one sample on a rank, of which this axis cuts the sequence?"""
        source, target = strategy.inside
        pairs = [(b.inputs[0], b.outputs[0]) for b in before]
        outer = [axis.size for axis, pair in zip(self.axes, pairs, strict=False) if pair == (source, target)]
        return math.prod(outer) == min(operand.shape[source], result.shape[target])

    def share(self, strategies: Sequence[Strategy], batched: bool) -> float:
        """Of the captured op's work, one rank's."""
        share = self.run_batch / self.batch if batched else 1.0
        for axis, strategy in zip(self.axes, strategies, strict=True):
            if is_split(strategy):
                share /= axis.size
            if axis.size > 1:
                share *= self.work_factor(strategy, axis.size)
        return share

    def work_factor(self, strategy: Strategy, ranks: int) -> float:
        """Of the work of the rank that has most, over an equal share: where tokens are sent to experts, the others wait
        for the rank that most go to; what else is uneven the program's record says."""
        factor = self.imbalance if is_dispatch(strategy) else 1.0
        work = LOWERINGS[strategy.lowering].work if strategy.lowering else None
        return factor * work(ranks) if work is not None else factor

    def state_bytes(self, sizes: Sizes, is_trained: bool) -> float:
        """Of training state that a whole parameter of these sizes stands for."""
        if not self.weighs_vectors and len(sizes.shape) < 2:
            return 0.0
        return self.state_of(math.prod(sizes.shape), sizes.num_bytes, is_trained)

    # ------------------------------------------------------------------ seconds

    def sum_s(self, sizes: Sizes, places: Places) -> float:
        """Once a step, of a parameter's gradient that leaves the graph so."""
        if self.sum_all_s is None:
            return 0.0
        summed = tuple(
            axis.size > 1 and (p == P or (p == R and axis.role.grads_partial))
            for axis, p in zip(self.axes, places, strict=True)
        )
        elements = math.prod(sizes.shape) / self.shares(places)
        return self.sum_all_s(summed, elements) if any(summed) else 0.0

    def transfer_s(self, sizes: Sizes, before: Places, after: Places) -> float:
        """Of the cheapest sequence of collectives between two placements; infinite where there is none."""
        if before == after:
            return 0.0
        key = (sizes.shape, sizes.num_bytes, before, after)
        if key not in self._transfers:
            self._transfers[key] = self._transfer_s(sizes, before, after)
        return self._transfers[key]

    def _transfer_s(self, sizes: Sizes, before: Places, after: Places) -> float:
        steps = route(before, after)
        if steps is None:
            return INFINITE
        current, seconds = list(before), 0.0
        for k, source, target in steps:
            current[k] = R
            whole = sizes.num_bytes / self.shares(tuple(current))  # whole on this axis
            seconds += self._step_s(sizes.shape, current, k, source, target, whole)
            current[k] = target
        return seconds

    def _step_s(self, shape: Sequence[int], others: list[int], k: int, source: int, target: int, whole: float) -> float:
        axis, kind = self.axes[k], transition(source, target)
        if kind == "local":
            return self.memory_s(whole / axis.size) if target >= 0 else 0.0
        seconds = axis.collective_s(kind, whole)  # type: ignore[arg-type]
        if kind == "all_to_all":
            return seconds + self.memory_s(2 * whole / axis.size)
        dim = max(source, target)
        if dim > 0 and self._rows_before(shape, others, dim) > 1:  # pieces are not in one run of memory
            seconds += self.memory_s(whole)
        return seconds

    def lowering_s(self, strategies: Sequence[Strategy], first: Sizes) -> float:
        """The all-reduces inside the lowerings (ops/lowering.py) of an op whose first operand has these sizes."""
        seconds = 0.0
        for k, (axis, strategy) in enumerate(zip(self.axes, strategies, strict=True)):
            record = LOWERINGS.get(strategy.lowering)
            if record is not None and record.all_reduces:
                others = tuple(R if j == k else s.inputs[0] for j, s in enumerate(strategies))
                values = math.prod(first.shape[:-1]) / self.shares(others) if record.of_rows else 1
                item = first.num_bytes / max(math.prod(first.shape), 1)
                seconds += len(record.all_reduces) * axis.collective_s("all_reduce", values * item)
        return seconds

    def ring_s(
        self, strategies: Sequence[Strategy], operands: Sequence[Sizes], results: Sequence[Sizes], compute_s: float
    ) -> float:
        """What ring attention sends and does not hide: keys and values, in the backward with their gradients, go round
        beside all steps but the first; zigzag order is exchanged for before and after."""
        seconds = 0.0
        for k, (axis, strategy) in enumerate(zip(self.axes, strategies, strict=True)):
            if not strategy.lowering.startswith(RINGS):
                continue
            back = int(strategy.lowering.endswith("backward"))
            places = [
                tuple(R if j == k else s.inputs[i] for j, s in enumerate(strategies)) for i in range(len(operands))
            ]
            whole = [sizes.num_bytes / self.shares(place) for sizes, place in zip(operands, places, strict=True)]
            round_s = (1 + back) * axis.collective_s("all_gather", whole[1 + back] + whole[2 + back])
            seconds += max(0.0, round_s - compute_s * (1.0 - 1.0 / axis.size))
            if strategy.lowering.startswith(RINGS[1]):
                back_bytes = whole[back : back + 3] if back else whole[:1]  # results lie as what they are of
                moved = [*(whole if back else whole[:3]), *back_bytes]
                seconds += sum(axis.collective_s("all_to_all", b) + self.memory_s(2 * b / axis.size) for b in moved)
        return seconds

    def _rows_before(self, shape: Sequence[int], places: list[int], dim: int) -> int:
        rows = math.prod(shape[:dim])
        for axis, place in zip(self.axes, places, strict=True):
            if 0 <= place < dim:
                rows //= axis.size
        return rows


def is_split(strategy: Strategy) -> bool:
    return any(p >= 0 for p in (*strategy.inputs, *strategy.outputs)) or bool(strategy.lowering)


def compatible(first: Strategy, second: Strategy, shared: bool = False) -> bool:
    """On two axes at once: no tensor split twice on one dimension, unless it may be shared, and no two programs in the
    place of the op's, but those that are made for each other."""
    if not may_run_at_once(first, second, shared):
        return False
    shared = shared or cuts_again(first, second)
    places = zip((*first.inputs, *first.outputs), (*second.inputs, *second.outputs), strict=True)
    return shared or not any(a == b and a >= 0 for a, b in places)


def _may_dispatch(operands: Sequence[Sizes]) -> bool:
    """Are the experts whole parameters, which an axis that carries the batch may cut?"""
    return sum(sizes.of_experts for sizes in operands) in WEIGHTS.values()


RINGS = ("attention_ring", "attention_zigzag")
