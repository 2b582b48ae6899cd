"""Counts of a router: read from files, and what they make of predictions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright.costmodel.experts import imbalances
from shardwright.errors import ShardwrightError
from shardwright.planner.sharding.training import Job
from shardwright.planner.space.forcing import imbalance_of, parse_forced
from shardwright.routing import forced_imbalance

COUNTS = [[60, 20, 10, 10], [25, 25, 25, 25]]


def test_the_busiest_rank_of_each_layer_is_waited_for() -> None:
    """Of two ranks 80 of 100 tokens go to the first in one layer, and half in the other: 1.6 and 1 times the mean."""
    assert imbalances(COUNTS) == pytest.approx({2: 1.3, 4: (2.4 + 1) / 2})
    assert imbalances([[1, 2, 3]]) == pytest.approx({3: 1.5})  # of three experts, none on two ranks alike


def test_files_of_either_form_say_the_same(tmp_path: Path) -> None:
    lists, lines = tmp_path / "counts.json", tmp_path / "counts.csv"
    lists.write_text(json.dumps(COUNTS))
    rows = [f"{layer},{expert},{n}" for layer, row in enumerate(COUNTS) for expert, n in enumerate(row)]
    lines.write_text("\n".join(["layer,expert,count", *reversed(rows)]))
    assert forced_imbalance(str(lists)) == forced_imbalance(str(lines)) == "2:1.3/4:1.7"


@pytest.mark.parametrize(
    "text", ["", "[[1, 2], [0, 0]]", "[[-1, 2]]", "[1, 2]", "[[1, null]]", "0,1", "0,a,3", "[[1,", "{}"], ids=str
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "counts"
    path.write_text(text)
    with pytest.raises(ShardwrightError, match="cannot be read"):
        forced_imbalance(str(path))
    with pytest.raises(ShardwrightError, match="No such file"):
        forced_imbalance(str(tmp_path / "missing"))


def test_layers_that_no_number_of_ranks_divides_are_named(tmp_path: Path) -> None:
    path = tmp_path / "counts.json"
    path.write_text(json.dumps([[1] * 4, [1] * 9, [1] * 4]))
    with pytest.raises(ShardwrightError, match=r"4 \(layer 0\), 9 \(layer 1\) experts") as caught:
        forced_imbalance(str(path))
    assert str(path) in caught.value.what and caught.value.change == "--routing FILE"


def test_a_width_that_was_not_counted_takes_the_next_fewer_ranks() -> None:
    job = Job(imbalances=imbalance_of("2:1.3/4:1.7"))
    assert [job.imbalance(ranks, 1.1) for ranks in (2, 3, 4, 8)] == [1.3, 1.3, 1.7, 1.7]
    assert Job(imbalances=imbalance_of("1.2")).imbalance(8, 1.1) == 1.2
    assert Job(imbalances=imbalance_of("4:1.7")).imbalance(2, 1.1) == Job().imbalance(2, 1.1) == 1.1


@pytest.mark.parametrize("text", ["0.9", "nan", "4:", "2:1.1/x", "inf", "-2:1.5"])
def test_factors_below_one_are_refused(text: str) -> None:
    with pytest.raises(ShardwrightError, match="takes a factor of 1 or more"):
        parse_forced({"expert_imbalance": text})
