"""Published runs are predicted through the planner's own path, and stacks say what software adds."""

from __future__ import annotations

import csv
import json
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import shardwright
from shardwright.cli import main
from shardwright.costmodel.constants import default_constants
from shardwright.costmodel.model import CostModel
from shardwright.costmodel.stacks import (
    OWN_STACK,
    StackFigures,
    figure_names,
    figures_of,
    stack_named,
    stack_rows,
    stacks,
)
from shardwright.errors import ShardwrightError
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.models import load_workload

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
COLUMNS = """source,model,params_b,layers,hidden,ffn_hidden,heads,kv_heads,vocab,seq_len,gpu,num_gpus,gpus_per_node,
interconnect,dtype,dp,fsdp_shard,tp,pp,vpp,cp,ep,micro_batch,global_batch,recompute,schedule,flash_attention,compile,
outcome,metric,value,step_time_s,memory_gib,notes""".replace("\n", "").split(",")
MADE_UP = dict(
    model="LLAMA-tiny", layers=5, hidden=64, ffn_hidden=128, heads=4, kv_heads=4, vocab=128, seq_len=64,
    gpu="A100-80GB",
    num_gpus=4, gpus_per_node=4, dtype="bf16", dp=4, tp=1, pp=1, vpp=1, cp=1, ep=1, micro_batch=1, global_batch=8,
    recompute="none", schedule="1F1B", flash_attention="flash_attention2 + RMS kernel", outcome="ok",
    step_time_s=0.01, notes="",
)  # fmt: skip


@pytest.fixture
def benchmark_modules(monkeypatch):
    """The benchmarks' own modules, as long as the test runs."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("published", "calibrate")):
            del sys.modules[name]


def write_rows(folder: Path, *rows: dict) -> Path:
    with (folder / "aleph_made_up.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows({**dict.fromkeys(COLUMNS, ""), **MADE_UP, **row} for row in rows)
    return folder


def test_rows_are_predicted_and_those_left_out_have_a_reason(tmp_path, benchmark_modules):
    import published
    from published_path import PlannerPath
    from published_rows import read_rows
    from published_statistics import Judged, time_errors

    folder = write_rows(
        tmp_path,
        {},
        {"dp": 2, "pp": 2},
        {"dp": 2, "tp": 2},
        {"micro_batch": 2},
        {"dtype": "fp8"},
        {"ep": 4},
        {"micro_batch": 4096, "global_batch": 16384, "seq_len": 65536, "outcome": "oom", "step_time_s": ""},
    )
    rows = list(read_rows(folder))
    assert [row.left_out for row in rows if row.left_out] == [
        ["fp8 or fp4 products"],
        ["sizes of experts are not read from tables"],
    ]
    path = PlannerPath()
    judged = [Judged(row, path.predict(row)) for row in rows if not row.left_out]
    assert not any(one.found.error for one in judged)
    assert [one.found.fits for one in judged] == [True, True, True, True, False]
    assert time_errors(judged).rows == 4 and all(one.ratio for one in judged[:4])
    text = published.tables(judged, rows)
    assert "| aleph_made_up | 4 |" in text and "| aleph_made_up | 1 | fp8 or fp4 products |" in text
    assert "| aleph_made_up | 1 |" in text.split("## Order")[1]  # its one group
    json.dumps(published.as_json(judged, rows))


def test_a_deepened_graph_is_planned_as_the_one_captured_so_deep(tmp_path, benchmark_modules):
    from published_path import PlannerPath, _capture, deepened
    from published_rows import read_rows

    row = next(read_rows(write_rows(tmp_path, {"dp": 2, "pp": 2})))
    path = PlannerPath()
    assert row.model is not None and row.where is not None
    whole = _capture(row.model, row.compute, row.where, layers=row.model.layers).graph
    deep = path.ready(row).graph
    assert [i.segment for i in deep.instances] == [i.segment for i in whole.instances]
    assert deep.num_params == whole.num_params
    first = path.predict(row)
    path._graphs[row.model.layers] = whole
    path._sharders.clear()
    second = path.predict(row)
    assert first.step_s == pytest.approx(second.step_s, rel=1e-12) and first.peak_gib == second.peak_gib
    assert deepened(whole, row.model.layers) is whole


def test_regret_and_order_are_of_what_was_measured(benchmark_modules):
    from published_path import Prediction
    from published_rows import Row
    from published_statistics import Judged, choices, rank_correlation

    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 40]) == pytest.approx(1.0)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1.0)
    assert rank_correlation([1, 1, 2, 2], [1, 1, 2, 2]) == pytest.approx(1.0)

    def judged(layout: str, measured_s: float, predicted_s: float, fits: bool = True) -> Judged:
        row = Row("s", 0, "m", "ok", "A100", 8, global_batch=8, force={"tp": layout}, measured_s=measured_s)
        return Judged(row, Prediction(predicted_s, fits=fits))

    (found,) = choices([judged("1", 10, 9), judged("2", 8, 7), judged("4", 9, 6), judged("8", 7, 5, fits=False)])
    assert found.picked == "tp=4" and found.regret == pytest.approx(9 / 7 - 1) and found.layouts == 4


def test_a_fit_finds_the_figures_that_rows_were_made_with(benchmark_modules):
    from calibrate import fit, k_fold, predicted
    from calibrate_parts import MOVES, Parts

    neutral = {name: getattr(StackFigures(), name) for name in MOVES}
    true = neutral | {"product_factor": 1.1, "tensor_factor": 1.4}
    rows = []
    for k in range(40):
        slopes = dict.fromkeys(MOVES, 0.0) | {
            "product_factor": 1.0,
            "tensor_factor": 0.1 * (k % 5),
            "memory_factor": 0.2,
        }
        base = 1.2 + slopes["tensor_factor"]
        made = Parts("s", k, f"g{k % 8}", "x", 0.0, base, slopes, neutral)
        rows.append(replace(made, measured_s=predicted(made, true)))
    figures = fit(rows)
    assert figures["tensor_factor"] == pytest.approx(1.4, rel=0.03)
    assert max(abs(ratio - 1) for ratio in k_fold(rows)) < 0.02


def test_a_stack_has_at_most_eight_figures_each_with_a_meaning_and_a_source():
    assert all(len(figures_of(name)) <= 8 for name in stacks())
    assert not figures_of(OWN_STACK)
    assert {"megatron", "megatron_2021", "deepspeed", "nanotron", "llm_foundry", OWN_STACK} <= set(stacks())
    rows = stack_rows()
    assert {row["name"].split(".")[2] for row in rows if row["name"].startswith("stack.")} <= set(figure_names())
    assert all(row["meaning"] and row["source"] and math.isfinite(float(row["value"])) for row in rows)
    assert not {row["name"] for row in rows} & {row["name"] for row in default_constants().rows()}


def test_assumptions_list_the_figures_of_all_stacks(capsys):
    assert main(["hardware", "--show-assumptions", "--json"]) == 0
    printed = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert {f"stack.megatron.{name}" for name in figures_of("megatron")} <= printed and figures_of("megatron")


@pytest.mark.parametrize(
    "figures",
    [
        {"product_factor": 1.2},
        {"memory_factor": 1.2},
        {"op_s": 1e-4},
        {"attention_factor": 1.5},
        {"tensor_factor": 1.5},
        {"dispatch_s": 1e-3},
        {"unhidden_fraction": 1.0},
    ],
    ids=lambda figures: next(iter(figures)),
)
def test_each_figure_of_a_stack_makes_the_step_longer(tiny_path, figures):
    path, row, plain = tiny_path
    slower = path.predict(row, stack_named(OWN_STACK).with_figures(**figures)).step_s
    assert slower > plain * 1.0001


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from published_path import PlannerPath
        from published_rows import read_rows
    finally:
        sys.path.remove(str(BENCHMARKS))
    folder = write_rows(tmp_path_factory.mktemp("rows"), {"dp": 2, "tp": 2, "hidden": 256, "seq_len": 256})
    path, row = PlannerPath(), next(read_rows(folder))
    yield path, row, path.predict(row, stack_named(OWN_STACK)).step_s
    for name in [name for name in sys.modules if name.startswith("published")]:
        del sys.modules[name]


def test_data_parallel_collectives_slow_down_with_hosts_under_contention():
    for hosts, slower in ((1, 1.0), (2, 1.0), (8, 1.2)):
        cluster = parse_hardware(f"{hosts}x8xA100-80GB")
        links = cluster.axis_links({"dp": cluster.num_devices}, "dp")
        plain = CostModel(cluster)
        contended = replace(plain, stack=plain.stack.with_figures(state_contention=0.1))
        seconds = [m.state_collective_seconds("all_gather", 1e9, links) for m in (plain, contended)]
        assert seconds[1] == pytest.approx(seconds[0] * slower)
        assert contended.tensor_collective_seconds("all_gather", 1e9, links) == pytest.approx(seconds[0])


def test_an_unknown_stack_is_refused_with_near_names():
    with pytest.raises(ShardwrightError, match="megatrn") as refused:
        stack_named("megatrn")
    assert refused.value.works == "--stack megatron"
    with pytest.raises(ShardwrightError, match="flahs3"):
        stack_named("megatron+flahs3")
    assert stack_named("megatron+flash3").figures.attention_factor < stack_named("megatron").figures.attention_factor


def test_what_a_fit_leaves_open_is_said_of_runs_that_it_did_not_see(benchmark_modules):
    from calibrate import order_error, spread
    from calibrate_parts import MOVES, Parts

    ratios = [0.8, 1.0, 1.25]  # predicted over measured
    low, high = spread(ratios)
    assert low == pytest.approx(0.8 + 0.2 * 0.2) and high == pytest.approx(1.0 + 0.8 * 0.25)
    zero = dict.fromkeys(MOVES, 0.0)
    rows = [Parts("s", k, group, "x", 1.0, 1.0, zero, zero) for k, group in enumerate("aab")]
    assert order_error(rows, ratios) == pytest.approx(0.25), "the third has no other of its group"
    assert order_error(rows[1:], ratios[1:]) == 0.0


def test_a_plan_for_gpus_says_between_which_times_published_runs_were():
    workload = load_workload("preset:tiny-llama", global_batch=8)
    low, high = stack_named("megatron").spread
    plan = shardwright.plan(workload, "2xA100-80GB", stack="megatron", self_test=False)
    step_s = plan.predicted.step_s
    assert plan.predicted.step_range_s == pytest.approx([low * step_s, high * step_s])
    assert low < 1 < high or low < high
    noise = stack_named("megatron").order_error
    for other in plan.considered:
        if other.step_s is not None and other.step_s > step_s * 1.001:
            assert other.reason.endswith(", a tie") == (other.step_s / step_s - 1 <= noise), other.reason
    on_cpu = shardwright.plan(workload, "2xCPU", self_test=False)
    assert on_cpu.predicted.step_range_s == [] and not any("a tie" in other.reason for other in on_cpu.considered)
