"""What a stage holds while one of its positions is worked on, beyond what lasts and what the whole stage keeps.

Positions behind it keep nothing yet, in a forward, or nothing any more, in a backward: with S the sums of what
positions keep, and w_k of position k what is alive in it beyond what positions up to k keep, a stage of positions
i..j-1 holds beside what it keeps

    max over i <= k < j of  w_k + S_{k+1} - S_j

Under ZeRO-3 w_k counts the whole parameters of position k, and of the one gathered for its sake, before it in a
backward, behind it in a forward. Under ZeRO-2 and 3 the gradients of a position, r_k, are packed at the end of its
backward, and two reductions are under way, of the two positions done before it (that is, behind it); at the start those
that the microbatch before left:

    while it runs       w_k + f (r_{k+1} + r_{k+2})         f: buffers of a reduction that is under way,
    when it packs       e_k + r_k + f (r_{k+1} + r_{k+2})   e_k: what is alive at its end
    when it reduces     e_k + f (r_k + r_{k+1})
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ...costmodel import memory
from ...costmodel.constants import assumed
from ..space.candidates import Candidate
from ..stages.chain import Chain, interval_maxima, prefix_sums
from ..stages.setting import Setting


@dataclass(frozen=True, eq=False)
class Beside:
    """Bytes of each position. forward, backward, end: alive in it, beyond what is kept. gathered: its whole parameters.
    packed: its gradients as they are reduced. buffers: f above. leaves: does one microbatch leave reductions to the
    next?"""

    forward: np.ndarray
    backward: np.ndarray
    end: np.ndarray
    gathered: np.ndarray
    packed: np.ndarray
    buffers: int
    leaves: bool

    def with_rising(self, other: Beside, positions: np.ndarray) -> Beside:
        """Of these positions what the other has."""
        alive = {}
        for name in ("forward", "backward", "end"):
            alive[name] = getattr(self, name).copy()
            alive[name][positions] = getattr(other, name)[positions]
        return replace(self, **alive)

    @property
    def least(self) -> np.ndarray:
        """Of each position, where a stage ends with it, wherever that begins."""
        pairs = np.concatenate([[np.inf], self.packed[:-1] + self.packed[1:]])
        under_way = self.buffers * self.leaves * np.minimum(2 * self.packed, np.minimum.accumulate(pairs))
        alive = np.maximum(self.backward, self.end + self.packed) + self.gathered
        return np.maximum(np.maximum(self.forward + self.gathered, alive) + under_way, 2 * self.gathered)

    def _around(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each position, whole parameters that are gathered in its backward and in its forward."""
        nothing = np.zeros(1)
        before, after = (np.concatenate(parts) for parts in ((nothing, self.gathered), (self.gathered, nothing)))
        return self.gathered + before[:-1], self.gathered + after[1:]

    def of_stage(self, kept: np.ndarray, start: int, stop: int) -> dict[str, int]:
        """By kind, at the worst moment. kept: by each position of the stage."""
        part = slice(start, stop)
        behind = kept.sum() - np.cumsum(kept)
        alive = {kind: getattr(self, kind)[part] for kind in ("forward", "backward", "end")}
        moments = [
            (alive.get(kind, np.zeros(stop - start)), gathered, buffers)
            for kind, gathered, buffers in self._moments(start, stop)
        ]
        totals = np.array([alive + gathered + buffers - behind for alive, gathered, buffers in moments])
        at, k = np.unravel_index(int(totals.argmax()), totals.shape)
        _, gathered, buffers = (float(sizes[k]) for sizes in moments[at])
        total = max(int(totals[at, k]), 0)
        gathered = min(int(gathered), total)
        buffers = min(int(buffers), total - gathered)  # the rest takes the place of what is kept no more
        return {
            "workspace": total - gathered - buffers,
            "gathered_parameters": gathered,
            "gradient_buffers": buffers,
        }

    def moments(self, start: int, stop: int) -> list[tuple[str, np.ndarray]]:
        """Of each moment of a stage's positions: what of theirs is alive ("forward", "backward", "end" or none of it),
        and bytes of all else."""
        return [(kind, gathered + buffers) for kind, gathered, buffers in self._moments(start, stop)]

    def _moments(self, start: int, stop: int) -> list[tuple[str, np.ndarray, np.ndarray]]:
        """(what is alive, gathered parameters, buffers of reductions) of each position."""
        part, count = slice(start, stop), stop - start
        left = self.packed[[start, min(start + 1, stop - 1)]] * self.leaves
        coming = np.concatenate([self.packed[start + 1 : stop], left])
        first, both = self.buffers * coming[:count], self.buffers * (coming[:count] + coming[1:])
        own, in_backward, in_forward = self.packed[part], *(size[part] for size in self._around())
        rest = np.full(count, self.buffers * left.sum())
        return [
            ("forward", in_forward, rest),
            ("", 2 * self.gathered[part], rest),
            ("backward", in_backward, both),
            ("end", in_backward, own + both),
            ("end", in_backward, self.buffers * own + first),
        ]

    def table(self, kept: np.ndarray) -> np.ndarray:
        """[i, j] -> the sum of that, of every stage. kept: by each position."""
        n, so_far = len(kept), prefix_sums(kept)
        in_backward, in_forward = self._around()
        packed = np.concatenate([self.packed, [0.0, 0.0]])
        left = np.concatenate([self.packed * self.leaves, [0.0]])  # by the first position of a stage
        second = left[np.minimum(np.arange(n + 1)[:, None] + 1, np.maximum(np.arange(n + 1)[None, :] - 1, 0))]

        def backward(k: slice, first: np.ndarray, then: np.ndarray) -> np.ndarray:
            both = self.buffers * (first + then)
            packing = np.maximum(self.packed[k] + both, self.buffers * (self.packed[k] + first)) + self.end[k]
            return np.asarray(np.maximum(self.backward[k] + both, packing) + in_backward[k])

        forward = np.maximum(self.forward + in_forward, 2 * self.gathered)
        found = interval_maxima(forward + so_far[1:]) - so_far + self.buffers * (left[:, None] + second)
        inner = interval_maxima(backward(slice(None), packed[1:-1], packed[2:]) + so_far[1:])
        found[:, 2:] = np.maximum(found[:, 2:], inner[:, :-2] - so_far[2:])
        last = backward(slice(None), left[:, None], second[:, 1:])  # position j - 1
        found[:, 1:] = np.maximum(found[:, 1:], np.where(_upper(n + 1, 1)[:, 1:], last, -np.inf))
        if n > 1:  # position j - 2
            one = backward(slice(n - 1), self.packed[1:], left[:, None]) + so_far[1:-1] - so_far[2:]
            found[:, 2:] = np.maximum(found[:, 2:], np.where(_upper(n + 1, 2)[:, 2:], one, -np.inf))
        return np.maximum(found, 0.0)


def _upper(size: int, above: int) -> np.ndarray:
    return np.triu(np.ones((size, size), dtype=bool), above)


def beside_of(setting: Setting, candidate: Candidate, chain: Chain) -> Beside:
    kinds, zero = setting.kinds, candidate.zero if candidate.state_ranks > 1 else 0
    kind = setting.mesh(candidate).devices[0].kind
    written = memory.gradients_are_written(kinds, zero, candidate.on_host)
    extent = (candidate.extents or memory.Extents.of(zero, candidate.state_ranks)).parameters
    gathered = chain.param_elements * kinds.compute
    if not memory.are_experts_gathered(extent, candidate.mesh.expert_ranks):
        gathered = gathered - chain.expert_elements * kinds.compute
    reduced, nothing = chain.trainable_elements.copy(), np.zeros(chain.num_instances)
    for repeat in chain.repeats:  # complete at its first position
        reduced[repeat.later] -= repeat.trainable
    return Beside(
        forward=chain.forward_workspace_bytes,
        backward=chain.written_workspace_bytes if written else chain.made_workspace_bytes,
        end=nothing if written else chain.end_workspace_bytes,
        gathered=gathered if zero == 3 else nothing,
        packed=reduced * kinds.reduce if zero >= 2 else nothing,
        buffers=round(assumed("reduction_buffers", kind)),
        leaves=zero >= 2 and candidate.count > 1,
    )
