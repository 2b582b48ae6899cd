"""DualPipeV: forwards of one chunk beside backwards of the other, on a V of two chunks."""

from __future__ import annotations

from ...costmodel.actions import Action
from ..schedule import PipelineSchedule, v_placement
from .v_blocks import v_schedule


def dualpipe_v(num_ranks: int, num_microbatches: int) -> PipelineSchedule:
    """DeepSeek's DualPipe (arXiv:2412.19437, section 3.2) cut in half: every rank holds one V instead of two
    directions.

    Eight steps for rank r, chunk 0 on the way down, chunk 1 on the way up; steps 4 and 5 pair a forward with a
    backward of the other chunk, which an engine may run at once. Bubble (p-1)(FB + B - 3W) in the paper's terms, FB a
    pair and B a backward; p + 1/2 microbatches of one rank's share. Fewer than 2p microbatches do not fill the steps:
    then ZB-V's order.
    """
    p, m = num_ranks, num_microbatches
    if m < 2 * p or p == 1:
        plain = v_schedule("zb_v", p, m)
        return PipelineSchedule("dualpipe_v", m, plain.stage_rank, plain.ranks)
    ranks = [tuple(_Rank(rank, p, m).steps()) for rank in range(p)]
    return PipelineSchedule("dualpipe_v", m, v_placement(p), tuple(ranks))


class _Rank:
    def __init__(self, rank: int, p: int, m: int) -> None:
        self.stage = (rank, 2 * p - 1 - rank)
        self.rank, self.p, self.m = rank, p, m
        self.next = {"F": [0, 0], "B": [0, 0]}
        self.put_off: list[Action] = []
        self.actions: list[Action] = []

    def forward(self, chunk: int) -> None:
        self.actions.append(Action("F", self.stage[chunk], self._take("F", chunk)))

    def backward(self, chunk: int, *, split: bool = False) -> None:
        i, stage = self._take("B", chunk), self.stage[chunk]
        self.actions.append(Action("I" if split else "B", stage, i))
        if split:
            self.put_off.append(Action("W", stage, i))

    def weight(self) -> None:
        if self.put_off:
            self.actions.append(self.put_off.pop(0))

    def _take(self, kind: str, chunk: int) -> int:
        i = self.next[kind][chunk]
        self.next[kind][chunk] = i + 1
        return i

    def steps(self) -> list[Action]:
        r, p, m = self.rank, self.p, self.m
        for _ in range(2 * (p - r - 1)):  # 1
            self.forward(0)
        for _ in range(r + 1):  # 2
            self.forward(0)
            self.forward(1)
        for _ in range(p - r - 1):  # 3
            self.backward(1, split=True)
            self.weight()
            self.forward(1)
        for _ in range(m - 2 * p + r + 1):  # 4
            self.forward(0)
            self.backward(1)
            self.forward(1)
            self.backward(0)
        for _ in range(p - r - 1):  # 5
            self.backward(1)
            self.forward(1)
            self.backward(0)
        half = (r + 1) // 2
        for index in range(r + 1):  # 6: from its middle on the weight gradients wait
            self.backward(1, split=index >= half + (r + 1) % 2)
            self.backward(0, split=index >= half)
        for _ in range(p - r - 1):  # 7
            self.weight()
            self.backward(0, split=True)
        self.actions += self.put_off  # 8
        return self.actions
