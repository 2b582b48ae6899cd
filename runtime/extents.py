"""Over how many data-parallel ranks parameters, gradients and optimizer state are cut: ZeRO, whole or inside a part.

A plan's ZeRO level says what is cut; its zero_extents, over how many consecutive data-parallel ranks, so that the
frequent collectives stay on fast links while copies of the cut state stand on other parts of the axis (MiCS, Zhang et
al., arXiv:2205.00119; PaRO, Wu et al., arXiv:2310.06003; AMSP, Chen et al., arXiv:2311.00257). Each extent divides the
next: what is gathered most often is cut least. With 8 ranks, parameters over 2 and optimizer state over 4:

    rank               0  1  2  3  4  5  6  7
    half of parameter  0  1  0  1  0  1  0  1       level 0: gathered before each use, inside pairs
    quarter of state   0a 1a 0b 1b 0a 1a 0b 1b      level 1: gathered after each optimizer step, over ranks 0,2 and 1,3
    copies             ----------- -----------      gradients are added up over ranks 0,4, over 1,5, ...

Parameters that the graph cuts over one of these axes, as experts are, have their state cut over the others alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..costmodel.memory import Extents
from ..errors import ExitCode, ShardwrightError

LEVEL_OF = {"parameters": 3, "gradients": 2, "optimizer": 1}  # the ZeRO level from which on each kind is cut


@dataclass(frozen=True)
class DataCut:
    """How the num_ranks ranks over which ZeRO may split state are cut by the extents of each kind of state. axes: that
    the ranks are indices into, with their sizes."""

    extents: Extents
    num_ranks: int
    axes: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, zero: int, given: Mapping[str, int], num_ranks: int, axes: Sequence[tuple[str, int]] = ()) -> DataCut:
        """given: of a plan; what it leaves out is cut over all ranks where the ZeRO level cuts it, else not.

        Raises ShardwrightError where an extent does not divide the next or the axis, or the level cuts no such thing.
        """
        found = {kind: given.get(kind, num_ranks if zero >= level else 1) for kind, level in LEVEL_OF.items()}
        for kind, level in LEVEL_OF.items():
            if zero < level and found[kind] != 1:
                raise _bad(given, num_ranks, f"ZeRO {zero} does not cut {kind}", f"zero={level} or more")
        chain = (*found.values(), num_ranks)
        if min(chain) < 1 or any(wide % narrow for narrow, wide in itertools.pairwise(chain)):
            raise _bad(given, num_ranks, "each extent must divide the next one", "the same extent for all three")
        return cls(Extents(**found), num_ranks, tuple(axes))

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name, _ in self.axes)

    def beside(self, cut: Iterable[str]) -> DataCut:
        """Of parameters that the graph cuts over these axes: their state is split over the rest, each kind over as many
        ranks as leave it with the same part of the whole, or nearly."""
        taken = set(cut)
        width = math.prod(size for name, size in self.axes if name in taken)
        if width == 1:
            return self
        extents = Extents(*(extent // math.gcd(extent, width) for extent in self.extents))
        return DataCut(extents, self.num_ranks // width, tuple((n, s) for n, s in self.axes if n not in taken))

    @property
    def levels(self) -> tuple[tuple[int, int], ...]:
        """(size, stride) of each digit of the data-parallel coordinate that cuts something, consecutive ranks first."""
        return tuple(
            (wide // narrow, narrow) for narrow, wide in itertools.pairwise((1, *self.extents)) if wide > narrow
        )

    @property
    def copies(self) -> tuple[int, int]:
        """(size, stride) of the digit over which everything is copied."""
        return self.num_ranks // self.extents.optimizer, self.extents.optimizer

    def num_levels(self, kind: str) -> int:
        """How many of the levels cut this kind of tensor."""
        extent: int = getattr(self.extents, kind)
        return sum(1 for size, stride in self.levels if size * stride <= extent)


@dataclass(frozen=True)
class Level:
    """One digit of the data-parallel coordinate as this rank sees it."""

    size: int
    index: int
    group: Any  # the process group of the ranks that differ in this digit alone


def _bad(given: Mapping[str, int], num_ranks: int, means: str, works: str) -> ShardwrightError:
    return ShardwrightError(
        f"zero_extents {dict(given)} on {num_ranks} data-parallel ranks",
        means=means,
        change="zero_extents in the plan, or its zero",
        works=works,
        exit_code=ExitCode.CONTRADICTION,
    )
