"""explain, why_not and diff: what they say of a plan is what planning says of it."""

from __future__ import annotations

import json

import pytest

from shardwright import api, cli, reasons
from shardwright.costmodel.model import CostModel
from shardwright.errors import ShardwrightError
from shardwright.planner.report.diff import compare
from shardwright.planner.sharding.sharder import Sharder

pytestmark = pytest.mark.usefixtures("shared_captures")

MODEL = dict(global_batch=32, seq_len=256, overrides={"num_layers": 2})
HARDWARE = "8xH100-80GB"


@pytest.fixture(scope="module")
def plan():
    return api.plan("preset:llama-3-8b", HARDWARE, force={"tp": 4, "pp": 1}, **MODEL)


@pytest.fixture(scope="module")
def explained(plan):
    return reasons.explain(plan)


@pytest.fixture(scope="module")
def paths(plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plans")
    other = api.plan("preset:llama-3-8b", HARDWARE, force={"dp": 8, "zero": 3}, **MODEL)
    plan.save(folder / "a.json")
    other.save(folder / "b.json")
    return str(folder / "a.json"), str(folder / "b.json")


def test_seconds_add_up_to_what_the_search_counted(plan, explained):
    graph = api.capture_of(plan, api.load_workload("preset:llama-3-8b", **MODEL))
    sharder = Sharder(graph, CostModel(reasons.cluster_of(plan)))
    dp = plan.mesh.dp
    costs = sharder.solve(plan.mesh.shape, plan.microbatch.size // dp).costs
    for name, sums in explained.totals().items():
        count, cost = plan.segments.count(name), costs[name]
        comm_s = sum(seconds for kind, seconds in sums.items() if kind != "compute")
        assert sums["compute"] == pytest.approx(count * (cost.forward_s + cost.backward_s), rel=1e-9)
        assert comm_s == pytest.approx(count * (cost.forward_comm_s + cost.backward_comm_s), rel=1e-9, abs=1e-15)
    assert any("tp reduce_scatter" in sums or "tp all_reduce" in sums for sums in explained.totals().values())


def test_every_forward_op_has_its_line_and_every_product_its_module(explained):
    ops = [row for row in explained.rows if row.op.startswith("aten.")]
    assert all(row.source for row in ops if row.phase == "forward")
    products = [row for row in explained.rows if row.op.startswith("aten.mm.") and row.module]
    linear = {row.module.rpartition(".")[2] for row in products}
    assert linear >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
    for name in ("q_proj", "down_proj"):  # one product forward, one for each gradient
        of_module = [row for row in products if row.module.endswith(name)]
        assert [row.phase for row in of_module] == ["forward", "backward", "backward"]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("mlp", "model.layers.0.mlp"),
        ("layers.*.mlp.up_proj", "model.layers.0.mlp.up_proj"),
        ("lm_head", "lm_head"),
    ],
)
def test_patterns_name_modules_and_what_is_in_them(explained, pattern, expected):
    found = explained.matching(pattern=pattern)
    assert found and all(row.module.startswith(expected) for row in found)


def test_patterns_name_ops(explained):
    assert {row.op for row in explained.matching(pattern="aten.mm.*")} == {"aten.mm.default"}
    assert explained.matching(pattern="no_such_thing") == ()


def test_another_choice_is_shown_with_its_price(plan):
    answer = reasons.why_not(plan, {"tp": "2"})
    assert answer.forced == {"tp": "2", "pp": "1"}
    assert answer.plan.mesh.tp == 2 and answer.plan.mesh.pp == 1
    assert ("tp", "4", "2") in [(c.what, c.before, c.after) for c in answer.difference.choices]
    assert answer.difference.step_s == (plan.predicted.step_s, answer.plan.predicted.step_s)
    for k, step_s in enumerate(answer.difference.step_s):
        assert sum(part[k] for part in answer.difference.time_s.values()) == pytest.approx(step_s, rel=1e-9)


def test_the_best_plan_is_no_slower_than_any_forced_one():
    best = api.plan("preset:llama-3-8b", HARDWARE, **MODEL)
    for choice in ({"zero": "3"}, {"layers.*.mlp": "colwise"}):
        before, after = reasons.why_not(best, choice).difference.step_s
        assert after >= before * 0.99, choice  # within what the planner counts as alike


def test_what_cannot_be_is_an_answer_too(plan):
    answer = reasons.why_not(plan, {"tp": "16"})
    assert answer.plan is None and "16" in answer.refusal.what


def test_a_choice_that_means_nothing_is_a_mistake(plan):
    with pytest.raises(ShardwrightError, match="tpp"):
        reasons.why_not(plan, {"tpp": "2"})


def test_other_hardware_is_refused(plan):
    with pytest.raises(ShardwrightError, match="other hardware"):
        reasons.explain(plan, hardware="8xA100-80GB")


def test_a_plan_does_not_differ_from_itself(plan):
    same = compare(plan, plan)
    assert same.choices == () and same.placements == () and same.comparable


def test_differences_are_those_of_the_documents(plan, paths):
    from shardwright.plans.document import Plan

    a, b = map(Plan.load, paths)
    found = compare(a, b)
    assert {c.what for c in found.choices} >= {"dp", "tp", "ZeRO", "forced"}
    weight = next(
        row for row in a.placements["segment4"] if row.startswith("param_") and _splits(a, row) != _splits(b, row)
    )
    assert any(c.segment == "segment4" and c.node == weight for c in found.placements)
    assert found.memory_bytes["parameters"] == (a.predicted.memory["parameters"], b.predicted.memory["parameters"])


def _splits(plan, key):
    sizes = plan.mesh.model_dump()
    texts = zip(plan.placement_axes, plan.placements["segment4"][key], strict=True)
    return [(axis, text) for axis, text in texts if sizes[axis] > 1 and text != "R"]


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (("explain", "A"), "ops"),
        (("explain", "A", "--op", "lm_head", "--segment", "segment5"), "ops"),
        (("explain", "A", "--why-not", "tp=2", "--why-not", "layers.*.mlp=rowwise"), "difference"),
        (("diff", "A", "B"), "choices"),
    ],
)
def test_commands_print_json_and_tables(capsys, paths, arguments, key):
    arguments = [{"A": paths[0], "B": paths[1]}.get(argument, argument) for argument in arguments]
    assert cli.main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[key]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("explain", "A", "--op", "nothing"), "--op"),
        (("explain", "A", "--segment", "nothing"), "segment4"),
        (("explain", "A", "--why-not", "tp"), "KEY=VALUE"),
        (("diff", "A", "no.json"), "no.json"),
    ],
)
def test_mistakes_name_what_would_work(capsys, paths, arguments, expected):
    assert cli.main([paths[0] if argument == "A" else argument for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert expected in err and "Traceback" not in err
