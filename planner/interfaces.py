"""What the outer search asks of the sharding solver, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ..costmodel.segment import SegmentCost
from ..plans.axes import MeshShape


@dataclass(frozen=True)
class ShardingSolution:
    """The best placements found for every distinct segment on the mesh of a stage, and what they cost on one rank.

    objective_s and lower_bound_s add up the solver's objective over the instances of the model, per microbatch.
    """

    costs: dict[str, SegmentCost]  # by distinct segment
    placements: dict[str, dict[str, list[str]]]  # distinct segment -> joint-graph node -> one placement per axis
    boundary_bytes: dict[str, int]  # local bytes of each value that crosses a segment edge
    objective_s: float
    lower_bound_s: float
    gap_fraction: float
    seconds: float  # time the solver took
    status: str  # optimal | feasible
    conservative: list[Any] = field(default_factory=list)  # ops planned without a rule, each with its cost
    saved_bytes: int = 0  # kept from forward to backward, of all instances, per microbatch
    state_bytes: float = 0.0  # of training state, of all instances, before ZeRO
    exposed_s: float = 0.0  # of the sums of gradients, once a step: what the last backward does not hide
    split_shares: dict[str, dict[str, float]] = field(default_factory=dict)  # axis -> "parameters", "activations"
    expert_chunks: int = 1  # in which tokens go to experts

    @property
    def proven_share(self) -> float:
        """Of the solver's objective, what is certain."""
        if self.objective_s <= 0:
            return 1.0
        return min(1.0, max(0.0, self.lower_bound_s / self.objective_s))

    def weighed_bytes(self, state_share: float) -> float:
        """A byte of state counts as state_share of one that is kept for the backward."""
        return self.saved_bytes + state_share * self.state_bytes


class Sharder(Protocol):
    """Caches inside: the search asks for the same mesh more than once."""

    def solve(self, mesh: MeshShape, local_batch: int) -> ShardingSolution | None:
        """mesh: of one stage. local_batch: sequences that one data-parallel rank holds of a microbatch.

        None, or a ShardwrightError, where this mesh cannot shard anything.
        """
        ...

    def frontier(self, mesh: MeshShape, local_batch: int) -> list[ShardingSolution]:
        """That solution and others that are slower and keep fewer bytes, or less training state, fastest first."""
        ...

    def dispatch_seconds(self, mesh: MeshShape, local_batch: int) -> tuple[float, float]:
        """Of a microbatch through the whole model, forward and backward: what sending tokens to experts takes at
        least."""
        ...

    def leanest(self, mesh: MeshShape, local_batch: int, *, state_share: float) -> ShardingSolution | None:
        """Of least bytes, where a byte of training state counts as state_share of one that is kept for the
        backward."""
        ...
