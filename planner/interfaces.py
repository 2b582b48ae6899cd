"""What the outer search asks of the sharding solver, and nothing more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from ..costmodel.segment import SegmentCost


@dataclass(frozen=True)
class ShardingSolution:
    """The best placements found for every distinct segment on a (dp, tp) mesh, and what they cost on one rank.

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

    @property
    def proven_share(self) -> float:
        """Of the solver's objective, what is certain."""
        if self.objective_s <= 0:
            return 1.0
        return min(1.0, max(0.0, self.lower_bound_s / self.objective_s))


class Sharder(Protocol):
    """Caches inside: the search asks for the same mesh more than once."""

    def solve(self, *, dp: int, tp: int, local_batch: int) -> ShardingSolution | None:
        """local_batch: sequences that one data-parallel rank holds of a microbatch.

        None, or a ShardwrightError, where this tp cannot shard anything.
        """
        ...

    def frontier(self, *, dp: int, tp: int, local_batch: int) -> list[ShardingSolution]:
        """That solution and others that are slower and keep fewer bytes, fastest first."""
        ...
