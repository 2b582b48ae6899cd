"""SegmentCost: all that the search needs to know of one distinct segment under one sharding."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    workspace_bytes: int  # most that is alive inside one forward or backward beyond saved
    model_flops: float  # floating-point operations of forward + backward, no recomputation, this rank's share
    # all choices but to keep everything: by seconds, each freeing less a second than the one before; that of the whole
    # segment stands last where it is none of those
    recompute_points: tuple[RecomputePoint, ...]
    summed_elements: int = 0  # of the trainable: gradients that are partial sums over the tensor axis, once a step
    param_bytes: int = 0  # each parameter in its own dtype

    def counted_in(self, element_bytes: int) -> SegmentCost:
        """With as many parameter elements of so many bytes as take the bytes of all: frozen ones may be of a dtype of
        their own."""
        return replace(self, param_elements=-(-self.param_bytes // element_bytes))

    @property
    def backward_s(self) -> float:
        return self.backward_input_s + self.backward_weight_s
