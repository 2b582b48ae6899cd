"""The outer search: what it finds, never finds, proves, and says when it cannot."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matrix import cells
from planner_fakes import LLAMA_8B, LLAMA_70B, Case, Sizes

from shardwright.errors import ExitCode, ShardwrightError
from shardwright.planner.memory.rank_bytes import rank_breakdown
from shardwright.planner.search.step_time import lower_bound, run_timeline
from shardwright.planner.space.candidates import enumerate_candidates
from shardwright.planner.space.choices import Choices
from shardwright.planner.space.forcing import divisors, force_keys, parse_forced
from shardwright.planner.stages.chain import whole_segments
from shardwright.planner.stages.setting import Setting
from shardwright.plans import document as plan_document
from shardwright.profiler.workload import OptimizerSpec, Precision
from shardwright.units import GIB, MIB

FLOAT32 = Precision(torch.float32, torch.float32, torch.float32)


def brute_force(case: Case):
    """Every candidate, every choice of recomputation, every cut: the least simulated step that fits."""
    import itertools

    setting = Setting(case.graph, case.cluster, case.cost_model, case.workload)
    n = len(setting.shape.instances)
    best = (math.inf, None)
    for candidate in enumerate_candidates(Choices(), case.cluster.num_devices, case.workload.global_batch, n, 8):
        solution = case.sharder.solve(candidate.mesh, candidate.local_batch)
        for recompute in ((), ("block",), ("block", "head"), ("block", "head", "embed")):
            chain = setting.chain(solution, whole_segments(setting.shape, solution, recompute))
            for inner in itertools.combinations(range(1, n), candidate.num_stages - 1):
                bounds = (0, *inner, n)
                peaks = [
                    sum(rank_breakdown(setting, candidate, chain, bounds, r).values()) for r in range(candidate.pp)
                ]
                if all(peak <= setting.limit(candidate, r) for r, peak in enumerate(peaks)):
                    seconds = run_timeline(setting, candidate, chain, bounds).makespan_s
                    best = min(best, (seconds, candidate), key=lambda item: item[0])
                    assert lower_bound(setting, candidate, chain) <= seconds * (1 + 1e-9)
    return best


LIMITS = [(limit_mib, vocab) for limit_mib in (None, 40, 16, 9) for vocab in (500, 4000)]


@pytest.mark.parametrize(("limit_mib", "vocab"), cells(LIMITS, [LIMITS[k] for k in (0, 3, 4, 7)]))
def test_the_search_finds_what_brute_force_finds(limit_mib, vocab):
    case = Case(
        Sizes(layers=4, vocab=vocab), "4xCPU", 8, precision=FLOAT32,
        memory_limit_bytes=limit_mib * MIB if limit_mib else None,
    )  # fmt: skip
    best_s, best = brute_force(case)
    if best is None:
        with pytest.raises(ShardwrightError) as caught:
            case.search()
        assert caught.value.exit_code == ExitCode.DOES_NOT_FIT
        return
    result = case.search()
    assert result.predicted.step_s <= best_s * 1.02
    assert result.certificate.lower_bound_s <= best_s * (1 + 1e-9)
    assert max(result.predicted.peak_bytes) <= result.predicted.memory_limit_bytes


@settings(max_examples=12, deadline=None)
@given(
    st.integers(2, 6),
    st.sampled_from([2, 3, 4, 6, 8]),
    st.sampled_from([2, 6, 8, 12]),
    st.integers(4, 64),
    st.booleans(),
)
def test_what_is_chosen_always_fits_and_is_never_below_its_bound(layers, devices, batch, limit_mib, tied):
    case = Case(Sizes(layers=layers, tied=tied), f"{devices}xCPU", batch, memory_limit_bytes=limit_mib * MIB)
    try:
        result = case.search()
    except ShardwrightError as error:
        assert error.exit_code in (ExitCode.DOES_NOT_FIT, ExitCode.CONTRADICTION)
        assert error.change and error.works
        return
    assert result.mesh.num_devices == devices
    assert result.microbatch.size * result.microbatch.count == batch
    assert result.microbatch.size % result.mesh.dp == 0
    assert max(result.predicted.peak_bytes) <= limit_mib * MIB
    assert sum(result.predicted.memory.values()) <= limit_mib * MIB
    assert 0 <= result.certificate.gap_fraction < 1
    assert result.certificate.lower_bound_s <= result.predicted.step_s
    body = [s for stage in result.stages for s in stage.segments if s != 0]
    assert body == list(range(1, layers + 3))
    ranks = {rank for stage in result.stages for rank in stage.ranks}
    assert ranks == set(range(devices))


def test_every_choice_can_be_forced():
    case = Case(Sizes(layers=6), "8xCPU", 16)
    result = case.search(
        pp=2, dp=2, tp=2, zero=3, schedule="interleaved", microbatch=1, virtual_stages=2, recompute="all"
    )
    assert (result.mesh.pp, result.mesh.dp, result.mesh.tp, result.zero) == (2, 2, 2, 3)
    assert (result.schedule.name, result.schedule.virtual_stages) == ("interleaved_1f1b", 2)
    assert (result.microbatch.size, result.microbatch.count) == (2, 8)
    assert result.memory_policy.recompute["block"] == "all"
    assert len(result.stages) == 4 and result.stages[0].ranks == [0, 1, 2, 3] == result.stages[2].ranks


def test_forced_cuts_are_instances_at_which_stages_begin():
    case = Case(Sizes(layers=6), "2xCPU", 4)
    result = case.search(pp=2, cuts="3", recompute="none")
    assert [stage.segments for stage in result.stages] == [[0, 1, 2], [0, 3, 4, 5, 6, 7, 8]]
    with pytest.raises(ShardwrightError, match="no stage can begin at segment instance 99"):
        case.search(pp=2, cuts="99")


@pytest.mark.parametrize(
    ("force", "match", "works"),
    [
        ({"ppp": 2}, "unknown force key 'ppp'", "--force pp=2"),
        ({"shedule": "1f1b"}, "unknown force key", "--force schedule=1f1b"),
        ({"pp": "two"}, "whole number", "--force pp=2"),
        ({"zero": 4}, "zero takes 0, 1, 2, 3", "--force zero=1"),
        ({"schedule": "1g1b"}, "unknown schedule", "--force schedule=1f1b"),
        ({"recompute": "some"}, "recompute takes", "--force recompute=all"),
    ],
)
def test_unknown_keys_and_values_name_what_is_near(force, match, works):
    with pytest.raises(ShardwrightError, match=match) as caught:
        Case(Sizes(), "4xCPU", 8).search(**force)
    assert caught.value.works == works and caught.value.exit_code == ExitCode.USAGE


@pytest.mark.parametrize(
    ("force", "match", "works"),
    [
        ({"pp": 2, "dp": 2, "tp": 2}, "pp=2 dp=2 tp=2 makes 8 ranks, and there are 4", "--force "),
        ({"tp": 3}, "tp=3 makes 3 ranks", "--force tp="),
        ({"ep": 2}, "ep=2, and the model has no experts", "--force ep=1"),
        ({"experts": "dispatch"}, "no experts are split", "--force experts=auto"),
        ({"pp": 1, "schedule": "interleaved_1f1b"}, "with pp=1", "--force pp=2"),
        ({"schedule": "1f1b", "virtual_stages": 2}, "virtual_stages=2", "--force virtual_stages=1"),
        ({"microbatch": 3}, "does not divide into microbatches of 3", "--force microbatch=2"),
        ({"global_microbatch": 3}, "does not divide into microbatches of 3", "--force global_microbatch=2"),
        ({"dp": 4, "microbatch": 4}, "is 16 sequences, which a global batch of 8 does not", "--force microbatch=2"),
        (
            {"dp": 4, "global_microbatch": 2},
            "global_microbatch=2 does not divide over dp=4",
            "--force global_microbatch=4",
        ),
        (
            {"dp": 2, "microbatch": 2, "global_microbatch": 2},
            "global_microbatch=2 with dp=2",
            "--force global_microbatch=4",
        ),
        ({"pp": 1, "tp": 1, "microbatch": 4}, "microbatch=4 goes with no mesh of 4 devices", "--force microbatch="),
        ({"pp": 4, "virtual_stages": 4}, "16 stages forced", "--force pp=2"),
        ({"pp": 2, "cuts": "3,2"}, "do not rise", "--force cuts=2,3"),
        ({"pp": 4, "cuts": "3"}, "1 cuts make 2 stages", "--force pp=2"),
    ],
)
def test_contradictions_exit_4_with_numbers_and_a_value_that_works(force, match, works):
    case = Case(Sizes(layers=7), "4xCPU", 8)
    with pytest.raises(ShardwrightError, match=match) as caught:
        case.search(**force)
    assert caught.value.exit_code == ExitCode.CONTRADICTION
    assert caught.value.works.startswith(works)


def test_where_no_recomputation_is_forced_and_some_is_needed_the_search_may_choose_it():
    """What fits may be some recomputation in part, which forcing all of it would not be."""
    force = {"pp": 1, "microbatch": 8}
    need = max(Case(Sizes(layers=4), "1xCPU", 8).search(recompute="none", **force).predicted.peak_bytes)
    case = Case(Sizes(layers=4), "1xCPU", 8, memory_limit_bytes=need - MIB)
    with pytest.raises(ShardwrightError) as caught:
        case.search(recompute="none", **force)
    assert caught.value.works == "--force recompute=auto" and caught.value.exit_code == ExitCode.DOES_NOT_FIT
    assert max(case.search(recompute="auto", **force).predicted.peak_bytes) <= need - MIB


def test_a_batch_that_does_not_divide_names_the_nearest_that_does():
    case = Case(Sizes(), "4xCPU", 6)
    with pytest.raises(ShardwrightError, match="6 does not divide over dp=4") as caught:
        case.search(dp=4)
    assert caught.value.works == "--global-batch 8" and caught.value.exit_code == ExitCode.CONTRADICTION
    tiny = Case(Sizes(layers=1), "7xCPU", 4, widest_tp=1)  # 3 segments, so that only dp=7 is left
    with pytest.raises(ShardwrightError, match="does not divide over 7 devices") as caught:
        tiny.search(tp=1)
    assert caught.value.works == "--global-batch 7"


def test_a_tensor_axis_that_cannot_shard_is_left_out():
    case = Case(Sizes(), "4xCPU", 8, widest_tp=2)
    result = case.search()
    assert result.mesh.tp <= 2
    reasons = [row.reason for row in case.search(microbatch=8).considered]
    assert any("cannot shard" in reason or "bound" in reason for reason in reasons)


def test_too_little_memory_exits_3_with_gib_rank_and_a_change_that_fits():
    case = Case(LLAMA_70B, "1x1xRTX4090", 32)
    with pytest.raises(ShardwrightError) as caught:
        case.search()
    error = caught.value
    assert error.exit_code == ExitCode.DOES_NOT_FIT
    assert "rank 0 (RTX4090" in error.what and "GiB missing" in error.what
    assert error.works.startswith("--hardware ")
    Case(LLAMA_70B, error.works.removeprefix("--hardware "), 32).search(recompute="all", zero=3)


def test_a_forced_choice_that_does_not_fit_is_the_change_named():
    case = Case(LLAMA_8B, "8xH100-80GB", 64)
    with pytest.raises(ShardwrightError) as caught:
        case.search(zero=0, dp=8, optimizer_state="device")
    assert caught.value.change == "--force zero" and caught.value.works in (
        "--force zero=1",
        "--force zero=3",
        "--force zero=2",
    )
    case.search(dp=8, zero=caught.value.works[-1], optimizer_state="device")


def test_a_memory_limit_that_is_too_low_names_one_that_would_do():
    case = Case(Sizes(layers=2), "2xCPU", 4)
    with pytest.raises(ShardwrightError) as caught:
        case.search(memory_limit_bytes=1 * MIB)
    assert caught.value.exit_code == ExitCode.DOES_NOT_FIT and caught.value.change == "--memory-limit"
    limit = float(caught.value.works.split()[1].removesuffix("GiB"))
    case.search(memory_limit_bytes=int(limit * GIB))


def test_llama_8b_on_16_h100_is_plausible():
    result = Case(LLAMA_8B, "2x8xH100-80GB", 256).search()
    predicted = result.predicted
    assert 0.3 < predicted.mfu < 0.7
    assert predicted.tokens_per_s_per_device == pytest.approx(256 * 8192 / predicted.step_s / 16)
    assert max(predicted.peak_bytes) <= predicted.memory_limit_bytes < 80 * GIB
    assert len(predicted.peak_bytes) == len(result.stages)
    assert result.certificate.gap_fraction < 0.1
    assert sum(predicted.memory.values()) == max(predicted.peak_bytes)


def test_runner_ups_say_why_they_lost():
    result = Case(Sizes(layers=6), "4xCPU", 8, memory_limit_bytes=7 * MIB, precision=FLOAT32).search()
    reasons = [row.reason for row in result.considered]
    assert all(reasons)
    assert any(reason.startswith("slower by") for reason in reasons)
    assert any(reason.startswith("needs") and " of " in reason for reason in reasons)
    assert all(isinstance(row, plan_document.Considered) for row in result.considered)


def test_the_time_limit_gives_the_incumbent_or_exit_6():
    case = Case(LLAMA_8B, "8x8xH100-80GB", 512)
    with pytest.raises(ShardwrightError) as caught:
        case.search(time_limit_s=0.0)
    assert caught.value.exit_code == ExitCode.TIME_LIMIT
    messages: list[str] = []

    def stop_after_an_incumbent(message: str) -> None:
        messages.append(message)
        if message.startswith("best so far"):
            raise KeyboardInterrupt

    result = case.search(progress=stop_after_an_incumbent)
    assert result.interrupted == "Ctrl-C"
    assert result.certificate.status == "feasible"
    whole = case.search()
    assert result.certificate.lower_bound_s <= whole.predicted.step_s <= result.predicted.step_s
    assert any(message.startswith("sharding") for message in messages)


def test_what_the_sharding_solver_left_open_lowers_the_bound():
    tight, loose = (Case(Sizes(), "4xH100-80GB", 8, gap=gap).search(pp=1, tp=4) for gap in (0.0, 0.25))
    assert loose.certificate.lower_bound_s < 0.8 * tight.certificate.lower_bound_s
    assert loose.predicted.step_s == pytest.approx(tight.predicted.step_s)


def test_clipping_waits_for_every_rank():
    plain = Case(Sizes(layers=6, vocab=20000), "4xCPU", 8)
    clipped = Case(Sizes(layers=6, vocab=20000), "4xCPU", 8, optimizer=OptimizerSpec(max_grad_norm=1.0))
    with_clip, without = (case.search(pp=4, schedule="1f1b").predicted.step_s for case in (clipped, plain))
    assert with_clip >= without


def test_post_validation_waits_for_no_rank_and_counts_what_it_keeps():
    plain, clipped, early = (
        Case(
            Sizes(layers=6, vocab=20000), "4xCPU", 8, optimizer=OptimizerSpec(max_grad_norm=limit, post_validation=post)
        )
        .search(pp=4, schedule="1f1b", microbatch=1)
        .predicted
        for limit, post in ((None, False), (1.0, False), (1.0, True))
    )
    assert plain.step_s == early.step_s <= clipped.step_s
    assert max(early.peak_bytes) >= max(clipped.peak_bytes)


def test_two_directions_hold_each_stage_on_two_ranks():
    result = Case(Sizes(layers=6), "4xCPU", 8).search(pp=4, schedule="chimera", microbatch=1)
    assert [stage.ranks for stage in result.stages] == [[0, 3], [1, 2], [2, 1], [3, 0]]
    assert result.predicted.peak_bytes == result.predicted.peak_bytes[::-1]


def test_mixed_clusters_keep_to_the_smallest_memory_and_favour_fast_stages():
    case = Case(LLAMA_8B, "1x8xH100-80GB+1x8xA100-40GB", 64)
    result = case.search(pp=2, dp=1, tp=8, schedule="1f1b")
    assert result.predicted.peak_bytes[1] <= 40 * GIB
    counts = [len(stage.segments) for stage in result.stages]
    assert counts[0] > counts[1]


def test_the_sharder_is_asked_for_few_meshes():
    case = Case(LLAMA_8B, "4x8xH100-80GB", 256)
    result = case.search()
    assert len({(tp, batch) for _, tp, batch in case.sharder.calls}) <= 30
    assert result.num_candidates > 500


@settings(deadline=None)
@given(st.integers(1, 5000))
def test_divisors(number):
    assert divisors(number) == [d for d in range(1, number + 1) if number % d == 0]


def test_all_force_keys_parse():
    values = {key: "1" for key in force_keys()} | {
        "schedule": "gpipe",
        "recompute": "none",
        "cuts": "3,5",
        "offload": "auto",
        "optimizer_state": "host",
        "prefer": "memory",
        "attention": "gather",
        "experts": "dispatch",
        "sequence_parallel": "off",
        "loss": "chunked",
    }
    forced = parse_forced(values)
    assert forced.cuts == (3, 5) and forced.schedule == "gpipe"
    assert forced.axes == {"pp": 1, "dp": 1, "ep": 1, "cp": 1, "tp": 1}


def test_orders_that_split_the_backward_compete():
    case = Case(Sizes(layers=6, vocab=20000), "4xCPU", 8)
    searched = {name: case.search(pp=4, schedule=name).predicted.step_s for name in ("1f1b", "gpipe", "zb_h1", "zb_h2")}
    free = case.search(pp=4)
    assert free.predicted.step_s <= min(searched.values()) * 1.01
    assert min(searched["zb_h1"], searched["zb_h2"]) < searched["1f1b"], "else this tells nothing"
    assert free.certificate.lower_bound_s <= free.predicted.step_s
