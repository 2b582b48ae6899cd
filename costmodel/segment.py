"""SegmentCost: all that the search needs to know of one distinct segment under one sharding."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Workspace:
    """Most bytes alive at once inside one forward or backward of a segment, beyond all that it keeps for its backward.

    forward: what is kept comes bit by bit, so this may be less than nothing. backward: gradients that may be written
    where they are added up are not counted; backward_made: they are, as made first and added up later. end: of a
    backward that has made all its gradients. kept_inputs: of what is kept, the bytes of each input.
    """

    forward: int
    backward: int
    backward_made: int
    end: int = 0
    kept_inputs: tuple[int, ...] = ()

    def divided(self, parts: int) -> Workspace:
        forward, backward, made, end = (
            -(-size // parts) for size in (self.forward, self.backward, self.backward_made, self.end)
        )
        return Workspace(forward, backward, made, end, tuple(-(-size // parts) for size in self.kept_inputs))


@dataclass(frozen=True)
class RecomputePoint:
    """A choice of what the backward makes again, and what that costs of one instance and microbatch on one rank.

    recomputed: names of captured ops (passes/partition.py); () with is_whole: all of them. forward_s, forward_comm_s:
    of what runs again. saved_bytes: still kept from forward to backward.
    """

    recomputed: tuple[str, ...]
    forward_s: float
    forward_comm_s: float
    saved_bytes: int
    is_whole: bool = False
    workspace: Workspace | None = None  # None: no more beyond what is kept without recomputation than that

    @property
    def seconds(self) -> float:
        return self.forward_s + self.forward_comm_s


@dataclass(frozen=True)
class SegmentCost:
    """Per instance, per microbatch, on one rank, under given placements. Seconds and bytes.

    The compute figures exclude collectives; comm figures are collectives inside the segment (tensor axis, loss).
    Parameters are counted after tensor sharding and before data-parallel (ZeRO) sharding.
    """

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    forward_comm_s: float
    backward_comm_s: float
    param_elements: int  # trainable and frozen
    trainable_elements: int
    buffer_bytes: int
    saved_bytes: int  # kept from forward to backward when nothing is recomputed (inputs included)
    input_bytes: int  # boundary values that come in
    output_bytes: int  # boundary values that go out
    workspace_bytes: int  # most that is alive inside one backward beyond saved, where `workspace` says no more
    model_flops: float  # floating-point operations of forward + backward, no recomputation, this rank's share
    # all choices but to keep everything: by seconds, each freeing less a second than the one before; that of the whole
    # segment stands last where it is none of those
    recompute_points: tuple[RecomputePoint, ...]
    expert_elements: int = 0  # of the trainable: experts that are cut over data ranks
    summed_elements: int = 0  # of the trainable: gradients that are partial sums over the tensor axis, once a step
    param_bytes: int = 0  # each parameter in its own dtype
    workspace: Workspace | None = None

    def counted_in(self, element_bytes: int) -> SegmentCost:
        """With as many parameter elements of so many bytes as take the bytes of all: frozen ones may be of a dtype of
        their own."""
        return replace(self, param_elements=-(-self.param_bytes // element_bytes))

    def held_at(self, point: RecomputePoint | None) -> Workspace:
        """Where it recomputes so much; None: nothing. What was kept without is made again inside the backward."""
        if point is not None and point.workspace is not None:
            return point.workspace
        plain = self.workspace or Workspace(self.workspace_bytes, self.workspace_bytes, self.workspace_bytes)
        if point is None:
            return plain
        more = max(self.saved_bytes - point.saved_bytes, 0)
        return replace(plain, backward=plain.backward + more, backward_made=plain.backward_made + more)

    @property
    def backward_s(self) -> float:
        return self.backward_input_s + self.backward_weight_s
