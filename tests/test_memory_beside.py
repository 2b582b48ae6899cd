"""What a stage holds beside what it keeps, one position at a time: by hand, and of all stages at once."""

from __future__ import annotations

import numpy as np
import pytest

from shardwright.planner.memory.beside import Beside


def beside(sizes: np.ndarray, buffers: int = 1, leaves: bool = True) -> Beside:
    return Beside(*sizes, buffers, leaves)


@pytest.mark.parametrize("buffers", [1, 2])
@pytest.mark.parametrize("leaves", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_the_table_of_all_stages_has_each_stage_as_it_is_alone(seed: int, leaves: bool, buffers: int) -> None:
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 7))
    sizes = rng.integers(0, 50, (5, count)).astype(float) * rng.integers(0, 2, (5, 1))
    sizes[0] -= 10  # what a forward keeps comes bit by bit
    kept = rng.integers(0, 30, count).astype(float)
    found = beside(sizes, buffers, leaves)
    table = found.table(kept)
    for i in range(count):
        for j in range(i + 1, count + 1):
            assert table[i, j] == sum(found.of_stage(kept[i:j], i, j).values()), (i, j)


def test_positions_behind_the_one_at_work_keep_nothing() -> None:
    forward, backward, none = np.array([0.0, 0, 0]), np.array([50.0, 20, 10]), np.zeros(3)
    found = beside(np.array([forward, backward, none, none, none]))
    kept = np.array([5.0, 20, 15])
    assert found.of_stage(kept, 0, 3)["workspace"] == max(50 - 35, 20 - 15, 10)
    assert found.of_stage(kept[1:], 1, 3)["workspace"] == 10


def test_reductions_under_way_are_of_the_positions_just_done_and_of_the_microbatch_before() -> None:
    none, packed = np.zeros(3), np.array([100.0, 10, 1])
    kept = np.array([1000.0, 1000, 1000])  # the last position is the worst
    alone, many = (beside(np.array([none, none, none, none, packed]), 1, leaves) for leaves in (False, True))
    assert alone.of_stage(kept, 0, 3) == {"workspace": 0, "gathered_parameters": 0, "gradient_buffers": 1}
    assert many.of_stage(kept, 0, 3)["gradient_buffers"] == 1 + 100 + 10
    assert many.of_stage(np.zeros(3), 0, 3)["gradient_buffers"] == 1 + 100 + 10  # as its own two, and its own
    twice = beside(np.array([none, none, none, none, packed]), 2, False)
    assert twice.of_stage(np.zeros(3), 0, 3)["gradient_buffers"] == max(100 + 2 * (10 + 1), 2 * (100 + 10))


def test_the_next_whole_parameters_are_gathered_beside_those_in_use() -> None:
    none, gathered = np.zeros(3), np.array([7.0, 30, 4])
    found = beside(np.array([none, none, none, gathered, none]))
    assert found.of_stage(np.array([0.0, 0, 0]), 0, 3)["gathered_parameters"] == 60  # as it is unpacked
    assert found.of_stage(np.array([0.0, 0, 90]), 0, 3)["gathered_parameters"] == 34
