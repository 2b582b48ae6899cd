"""Sequences of different lengths in a step: each on a group of ranks as wide as it needs, balanced by work."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from shardwright.cli import main
from shardwright.errors import ShardwrightError
from shardwright.lengths import read_lengths
from shardwright.planner.lengths import assignment
from shardwright.planner.lengths.assignment import (
    Assignment,
    GroupWork,
    assign,
    assign_in_rounds,
    of_width,
    single_width,
)


def _works(widths: list[int], most: int, sent: float = 0.3) -> list[GroupWork]:
    """Wide groups send more."""
    return [GroupWork(w, 1e-4 * (1 + sent * (w > 1)) / w, 1e-8 / w, most * w, 2e-6 * (w > 1)) for w in widths]


def _partitions(ranks: int, widths: list[int]) -> Iterator[tuple[int, ...]]:
    """Groups of ranks, widest first, that fill them."""
    if ranks == 0:
        yield ()
    for at, width in enumerate(widths):
        if width <= ranks:
            yield from ((width, *rest) for rest in _partitions(ranks - width, widths[at:]))


def _least(lengths: list[int], works: list[GroupWork], ranks: int) -> float:
    """Of all groups and all assignments."""
    by_width = {work.width: work.seconds(np.array(lengths)) for work in works}
    best = float("inf")
    for groups in _partitions(ranks, sorted(by_width, reverse=True)):
        for places in itertools.product(range(len(groups)), repeat=len(lengths)):
            work = [0.0] * len(groups)
            for i, place in enumerate(places):
                work[place] += by_width[groups[place]][i]
            best = min(best, max(work))
    return best


def _check(found: Assignment, lengths: list[int], works: list[GroupWork], ranks: int) -> None:
    by_width = {work.width: work for work in works}
    assert sorted(i for group in found.groups for i in group.sequences) == list(range(len(lengths)))
    rounds = {group.round for group in found.groups}
    assert all(sum(group.width for group in found.groups if group.round == number) <= ranks for number in rounds)
    for group in found.groups:
        own = np.array([lengths[i] for i in group.sequences], dtype=float)
        assert (own <= by_width[group.width].most_tokens).all()
        assert group.seconds == pytest.approx(by_width[group.width].seconds(own).sum())
    busiest = (max(group.seconds for group in found.groups if group.round == number) for number in rounds)
    assert found.seconds == pytest.approx(sum(busiest))


def test_small_steps_are_near_the_best_of_all_assignments() -> None:
    random = np.random.default_rng(0)
    excess = []
    for _ in range(12):
        lengths = [int(length) for length in np.exp(random.normal(8, 1.2, 5)) + 1]
        works = _works([1, 2, 4], most=max(lengths) // 2)
        found, least = assign(lengths, works, 4), _least(lengths, works, 4)
        assert found is not None
        _check(found, lengths, works, 4)
        assert found.bound_s <= least * (1 + 1e-9) and found.seconds >= least * (1 - 1e-9)
        excess.append(found.seconds / least)
    assert max(excess) < 1.1 and np.mean(excess) < 1.02


def test_a_long_tail_is_faster_on_groups_of_several_widths() -> None:
    lengths = read_lengths("lognormal:median=1500,sigma=1.5,max=262144,seed=1", 512)
    lengths[0] = 262144
    works = [  # beyond a host of 8 ranks, what is sent takes longer than the rest
        GroupWork(w, 1e-4 * (1 + (0.0, 0.1, 1.3)[(w > 1) + (w > 8)]) / w, 2e-10 / w, 4100 * w)
        for w in (1, 2, 4, 8, 16, 32, 64)
    ]
    found = assign_in_rounds(lengths, works, 64)
    alone = single_width(lengths, works, 64)
    assert found is not None and alone is not None
    _check(found, lengths, works, 64)
    assert alone.seconds / found.seconds > 1.4 and found.seconds < 1.2 * found.bound_s
    assert {group.round for group in found.groups} == {0, 1}  # the longest has all ranks for itself first
    assert len({group.width for group in found.groups}) > 1


def test_equal_sequences_stay_on_groups_of_one_width() -> None:
    works = _works([1, 2, 4], most=10000)
    found = assign([1000] * 16, works, 4)
    assert found is not None and [group.width for group in found.groups] == [1] * 4
    assert found.seconds == pytest.approx(4 * float(works[0].seconds(np.array([1000]))[0]))


def test_what_fits_no_group_has_none() -> None:
    works = _works([1, 2, 4], most=100)
    assert assign([401], works, 4) is None and of_width([101], works[0], 4) is None
    alone = assign([400], works, 4)
    assert alone is not None and alone.groups[0].width == 4


def test_what_a_ring_sends_hides_beside_attention() -> None:
    work = GroupWork(4, 1e-6, 1e-9, 1 << 20, ring_s=1e-5)
    short, long = work.seconds(np.array([1000, 100000])) - 1e-6 * np.array([1000, 100000])
    assert short == pytest.approx(1e-3 + 1e-2 - 0.75e-3) and long == pytest.approx(10.0)


def test_lengths_are_read_from_a_file_and_repeated(tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("# tokens, how many\n4096 2\n\n100\n")
    assert read_lengths(str(path), 5) == [4096, 4096, 100, 4096, 4096] and read_lengths(str(path), 1) == [4096]
    drawn = read_lengths("lognormal:median=4096,sigma=1.2,max=8192,seed=3", 1000)
    assert drawn == read_lengths("lognormal:median=4096,sigma=1.2,max=8192,seed=3", 1000)
    assert max(drawn) == 8192 and 3500 < np.median(drawn) < 4700


@pytest.mark.parametrize("text", ["12 x", "0", "1 2 3", "", "-4"])
def test_a_line_that_is_no_length_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text(text)
    with pytest.raises(ShardwrightError, match=r"lengths\.txt"):
        read_lengths(str(path), 4)


@pytest.mark.parametrize("text", ["lognormal:mean=3", "lognormal:median=x", "lognormal:sigma=-1", "/no/such/file"])
def test_a_distribution_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ShardwrightError) as caught:
        read_lengths(text, 4)
    assert caught.value.exit_code == 2 and "lognormal:" in caught.value.works


def test_plan_assigns_the_lengths_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "lengths.txt"
    path.write_text("64 6\n512\n")
    code = main(
        ["plan", "preset:tiny-llama", "--hardware", "4xH100", "--global-batch", "7", "--lengths", str(path), "--json"]
    )
    found = json.loads(capsys.readouterr().out)
    assert code == 0 and found["num_sequences"] == 7 and found["longest"] == 512
    assert sorted(n for group in found["groups"] for n in group["lengths"]) == [64] * 6 + [512]
    assert found["speedup"] >= 1 and found["bound_s"] <= found["step_s"]


def test_a_program_that_was_not_solved_in_time_proves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, works = [4000] * 3 + [1000] * 9, _works([1, 2, 4], most=8000)
    true = assign(lengths, works, 4)
    monkeypatch.setattr(assignment, "solve_model", lambda *args, **options: SimpleNamespace(status="unknown"))
    found = assign(lengths, works, 4)
    assert true is not None and found is not None
    seconds = np.stack([work.seconds(np.array(lengths)) for work in works], 1)
    assert found.bound_s == pytest.approx(assignment._least(seconds, [1, 2, 4], 4)) and found.bound_s <= true.seconds


def test_what_an_assignment_decides_cannot_be_forced(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", "preset:tiny-llama", "--hardware", "4xCPU", "--lengths", "lognormal:median=8,max=16"]
    arguments += ["--global-batch", "8"]
    assert main([*arguments, "--force", "zero=3"]) == 4
    assert "--force zero=3" in capsys.readouterr().err
