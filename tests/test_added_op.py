"""An op whose facts stand in one file (added_op.py) is planned, priced, run, proved and explained."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from compared import assert_same_numbers, compared, plan_once

import shardwright
from shardwright.api import capture_for_planning
from shardwright.costmodel.compute import op_class
from shardwright.ops.facts import OpFacts, add_op
from shardwright.ops.lowering import LOWERINGS, Lowering
from shardwright.passes.lowerings import PROGRAMS, program_of
from shardwright.plans.document import Plan
from shardwright.profiler.op_view import view_of
from shardwright.profiler.work import op_work
from shardwright.tasks import check_workload

SPEC = {"model": "added_op:net", "kind": "factory", "global_batch": 8}


@pytest.fixture(scope="module")
def planned() -> Plan:
    return plan_once(SPEC, "2xCPU", {"tp": 2, "first.weight": "S(0)", "last.weight": "S(1)"})


def _rows(plan: Plan) -> list[str]:
    found = [row for rows in plan.placements.values() for key, row in rows.items() if key.startswith("shares")]
    return [text for row in found for text in row]


def test_its_rule_is_planned_with_its_program_in_its_place(planned: Plan) -> None:
    assert "S(2)->S(2)@shares_cols" in _rows(planned)
    assert not any("shares" in row.op for row in planned.conservative_ops)


def test_it_computes_what_the_model_computes(planned: Plan, tmp_path: Path) -> None:
    assert_same_numbers(compared(planned, tmp_path))


def test_a_program_that_reduces_otherwise_than_its_record_says_is_found(
    planned: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = dataclasses.replace(LOWERINGS["shares_cols"], all_reduces=())
    monkeypatch.setitem(LOWERINGS, "shares_cols", silent)
    with pytest.raises(Exception, match="all_reduce"):
        compared(planned, tmp_path)


def test_its_work_is_what_its_facts_say() -> None:
    graph = capture_for_planning(check_workload(SPEC))
    nodes = [n for segment in graph.segments.values() for n in segment.joint.graph.nodes if "shares" in str(n.target)]
    assert nodes and all(op_work(node).flops == 2 * view_of(node).outputs[0].numel() for node in nodes)
    assert op_class(str(nodes[0].target)) == "reduction"


def test_it_is_explained(planned: Plan) -> None:
    rows = [row for row in shardwright.explain(planned, trust_model=True).rows if "shares" in row.op]
    assert rows and all(row.compute_s > 0 and "added_op.py" in row.source for row in rows)
    assert any("shares_cols" in row.placements["tp"] for row in rows)


def test_every_program_has_a_record_and_every_record_a_program() -> None:
    assert set(PROGRAMS) | {"shares_cols"} >= set(LOWERINGS) >= set(PROGRAMS)
    assert all(callable(program_of(name)) for name in LOWERINGS)


@pytest.mark.parametrize("lowering", [Lowering("made_up"), Lowering("nll_rows", emit=lambda *given: None)])
def test_a_program_that_is_none_or_has_anothers_name_is_no_fact(lowering: Lowering) -> None:
    with pytest.raises(ValueError, match="a name of its own"):
        add_op(torch.ops.aten.mm, OpFacts(rule=lambda view: [], lowerings=(lowering,)))
