"""`shardwright fits`: what it says fits can be planned, and what it says does not cannot."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import shardwright
from shardwright import adapters, fits
from shardwright.cli import main
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.probing import OutOfTime, Prober, Size, Verdict
from shardwright.profiler.cluster import Cluster
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.models import load_workload
from shardwright.profiler.workload import Workload
from shardwright.units import MIB

pytestmark = pytest.mark.usefixtures("shared_captures")

MLP = "preset:mlp"
GPT2 = "preset:tiny-gpt2"  # one layer of it


def make_prober(model: str, force: Mapping[str, str] | None = None, **options: Any) -> Prober:
    overrides = {"num_layers": 1} if model == GPT2 else None

    def load(seq_len: int | None) -> Workload:
        return load_workload(model, global_batch=1, seq_len=seq_len, overrides=overrides)

    return Prober(load, force or {}, **options)


def can_be_planned(model: str, hardware: str, batch: int, limit: int, **force: int) -> bool:
    try:
        shardwright.plan(model, hardware, global_batch=batch, memory_limit_bytes=limit, force=force, self_test=False)
    except ShardwrightError as error:
        assert error.exit_code == ExitCode.DOES_NOT_FIT
        return False
    return True


@given(st.integers(0, 3000), st.integers(1, 200), st.booleans(), st.sampled_from([1, 7, 64]))
@settings(max_examples=200, deadline=None)
def test_the_largest_value_is_next_to_one_that_fails_and_nothing_is_planned_twice(
    threshold: int, start: int, near: bool, grain: int
) -> None:
    asked: list[int] = []

    def probe(value: int) -> Verdict:
        asked.append(value)
        return Verdict(value <= threshold, value, 3000, {"activations": value})

    found = fits.largest(probe, start, 2000, grain=lambda value: grain, near=near)
    assert len(asked) == len(set(asked))
    assert found.value <= min(threshold, 2000)
    if threshold >= 2000:
        assert found.value == 2000 and found.beyond is None
    else:
        assert found.beyond is not None and threshold < found.beyond <= found.value + grain
    assert (found.value in asked) == (found.value > 0)


def test_a_search_that_runs_out_of_time_gives_what_was_proven() -> None:
    def probe(value: int) -> Verdict:
        if value > 10:
            raise OutOfTime
        return Verdict(True, 1, 2, {"activations": 1})

    found = fits.largest(probe, 1, 2000)
    assert (found.value, found.beyond, found.out_of_time) == (8, None, True)


def test_the_answer_is_the_plans_own_memory_and_its_sizes_can_be_planned_and_no_larger_ones() -> None:
    limit, cluster = MIB, parse_hardware("1xCPU")
    found = fits.answer(make_prober(MLP, memory_limit_bytes=limit), cluster, 64, None)
    made = shardwright.plan(MLP, "1xCPU", global_batch=64, memory_limit_bytes=limit, self_test=False)
    assert found.verdict.fits
    assert found.verdict.memory == made.predicted.memory
    assert found.verdict.peak_bytes == max(made.predicted.peak_bytes)
    by_rank, single = found.microbatch, found.single_batch
    assert by_rank is not None and single is not None and by_rank.beyond and single.beyond
    assert can_be_planned(MLP, "1xCPU", 2 * by_rank.value, limit, microbatch=by_rank.value)
    assert not can_be_planned(MLP, "1xCPU", 2 * by_rank.beyond, limit, microbatch=by_rank.beyond)
    assert can_be_planned(MLP, "1xCPU", single.value, limit, global_microbatch=single.value)
    assert not can_be_planned(MLP, "1xCPU", single.beyond, limit, global_microbatch=single.beyond)
    assert single.beyond - single.value <= max(1, single.value // 32)
    assert found.sequence is None and any("sequence" in note for note in found.notes)


def test_what_does_not_fit_is_said_with_the_bytes_of_the_nearest_plan() -> None:
    limit = MIB // 64
    prober = make_prober(MLP, memory_limit_bytes=limit)
    found = fits.answer(prober, parse_hardware("1xCPU"), 64, None, search=False).verdict
    assert not found.fits and found.peak_bytes > found.limit_bytes == limit
    assert sum(found.memory.values()) == found.peak_bytes
    assert prober.num_plans == 1


def test_the_longest_sequence_is_found_from_one_that_is_too_long() -> None:
    limit = 3 * MIB
    prober = make_prober(GPT2, memory_limit_bytes=limit, force={"microbatch": "256", "recompute": "none"})
    found = fits.answer(prober, parse_hardware("1xCPU"), 256, 4)
    length = found.sequence
    assert not found.verdict.fits and length is not None and found.microbatch is None
    assert (length.value, length.beyond) == (3, 4)
    assert length.verdict is not None and 0 < length.verdict.margin_bytes < limit
    assert length.beyond_verdict is not None and length.beyond_verdict.margin_bytes < 0


def test_a_sequence_ends_where_the_models_positions_end() -> None:
    class OfPositions(Prober):
        """All that the model takes fits."""

        def job(self, cluster: Cluster, size: Size) -> Verdict:
            return Verdict(True, 1, 2)

        verdict = job

    load = make_prober(GPT2).load
    length = fits.answer(OfPositions(load, {}), parse_hardware("1xCPU"), 1, 16).sequence
    assert length is not None and length.value == 64 and length.beyond is not None and length.beyond <= 68
    assert length.beyond_verdict is not None and "positions for 1 to 64" in length.beyond_verdict.reason


def test_fewest_is_the_first_count_that_can_be_planned() -> None:
    prober = make_prober(MLP, memory_limit_bytes=24 * 1024, force={"zero": "3"})
    found = fits.fewest(prober, parse_hardware("1xCPU"), 12, None, 4)
    counts = [n for n in range(1, 5) if prober.verdict(parse_hardware(f"{n}xCPU"), Size(12)).fits]
    assert found.num_devices == counts[0] > 1
    assert len(prober._captured) == 1, "one graph is planned on every cluster"


def test_a_grid_has_a_row_for_each_length_which_ends_where_a_batch_does_not_fit() -> None:
    prober = make_prober(GPT2, memory_limit_bytes=8 * MIB)
    full = fits.grid(prober, parse_hardware("1xCPU"), [8], [1, 4096, 8192], lora=False)
    lora = fits.grid(prober, parse_hardware("1xCPU"), [8], [1], lora=True)
    first, second, third = full.verdicts[0]
    assert first is not None and first.fits
    assert second is not None and not second.fits and third is None
    adapted = lora.verdicts[0][0]
    assert adapted is not None and adapted.memory["optimizer"] < first.memory["optimizer"]


def test_without_peft_or_for_another_kind_of_model_the_grid_says_why_there_is_no_lora(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no transformers model" in adapters.why_no_lora(load_workload(MLP, global_batch=1))
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "pip install peft" in adapters.why_no_lora(load_workload(MLP, global_batch=1))
    assert main(["fits", MLP, "--hardware", "1xCPU", "--grid", "--batches", "1,2"]) == 0
    assert "no LoRA: the package peft is not installed" in capsys.readouterr().out.replace("\n", " ")


def test_the_exit_code_is_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fits", MLP, "--hardware", "1xCPU", "--only-answer", "--json"]
    assert main([*command, "--global-batch", "8"]) == 0
    yes = json.loads(capsys.readouterr().out)
    assert yes["fits"] and yes["margin_bytes"] == yes["limit_bytes"] - sum(yes["memory"].values()) > 0
    assert main([*command, "--global-batch", "64", "--memory-limit", "16KiB"]) == 3
    no = json.loads(capsys.readouterr().out)
    assert not no["fits"] and no["margin_bytes"] < 0 and "missing" in no["reason"]


@pytest.mark.parametrize(
    ("options", "code", "part"),
    [
        ((), 2, "--hardware 1x1xRTX4090"),
        (("--hardware", "1xCPU", "--grid", "--force", "microbatch=2"), 2, "--batches 2"),
        (("--hardware", "1x2xH100+1x2xA100", "--fewest"), 2, "--hardware 1x8xH100-SXM-80GB"),
        (("--hardware", "1xCPU", "--time-limit", "0.001"), 6, "--time-limit 60"),
        (("--hardware", "1xCPU", "--force", "microbach=2"), 2, "microbatch"),
        (("--hardware", "2xCPU", "--global-batch", "3", "--force", "dp=2"), 4, "would work"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_four_parts(
    options: tuple[str, ...], code: int, part: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fits", MLP, *options]) == code
    said = capsys.readouterr().err
    assert part in said and "Traceback" not in said


def test_within_a_node_every_number_is_a_size_and_beyond_it_whole_nodes() -> None:
    sizes = fits._sizes(parse_hardware("1x4xH100"), 16)
    assert sorted(sizes) == [1, 2, 3, 4, 8, 12, 16]
    assert sizes[12].startswith("3x4x")
    assert fits._least_between([5, 6, 7], lambda count: count >= 6, 8) == 6
    assert fits._least_between(range(17, 64), lambda count: count >= 40, 64) == 40
    assert fits._doubling([1, 2, 3, 4, 8, 12]) == [1, 2, 4, 8, 12]
