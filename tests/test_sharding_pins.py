"""Placements fixed by name: what a pattern names, what a form means, and what is said where it cannot be."""

from __future__ import annotations

from functools import cache

import pytest

from shardwright import api
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.planner.sharding.pins import Pin, Pins, is_pin
from shardwright.plans.document import Plan
from shardwright.profiler.graph import ModelGraph
from shardwright.profiler.models import load_workload

pytestmark = pytest.mark.usefixtures("shared_captures")


@cache
def plan(model: str, *force: str) -> Plan:
    pairs = dict(pair.split("=", 1) for pair in force)
    return api.plan(load_workload(f"preset:{model}", global_batch=8), "4xCPU", force=pairs)


@cache
def _graph(model: str) -> ModelGraph:
    return api.capture_for_planning(load_workload(model, global_batch=8))


def places(found: Plan, ending: str) -> set[str]:
    """How the parameters of this name lie over the tensor axis, in every segment that has one."""
    graph = _graph(found.workload["model"])
    return {
        found.placements[i.segment][f"param_{slot}"][1]
        for i in graph.instances
        for slot, name in enumerate(i.params)
        if name.endswith(ending)
    }


@pytest.mark.parametrize(
    ("force", "ending", "place"),
    [
        ("layers.*.mlp=colwise", "down_proj.weight", "S(0)"),
        ("layers.*.mlp=rowwise", "up_proj.weight", "S(1)"),
        ("*.q_proj=rowwise", "q_proj.weight", "S(1)"),
        ("model.embed_tokens.weight=S(0)", "embed_tokens.weight", "S(0)"),
        ("embed_tokens=colwise", "embed_tokens.weight", "S(1)"),
        ("*.o_proj.weight=tp:R", "o_proj.weight", "R"),
        ("layers.1.mlp.up_proj=rowwise", "up_proj.weight", "S(1)"),  # all instances of a block lie alike
    ],
)
def test_pins_hold(force: str, ending: str, place: str) -> None:
    found = plan("tiny-llama", force, "tp=2", "pp=1")
    assert places(found, ending) == {place}
    assert found.forced[force.split("=")[0]] == force.split("=", 1)[1]


def test_features_of_transposed_weights() -> None:
    """GPT-2 keeps weights [in, out]: their columns are dimension 1."""
    assert places(plan("tiny-gpt2", "h.*.mlp.c_fc=colwise", "tp=2", "pp=1"), "mlp.c_fc.weight") == {"S(1)"}


def test_results_of_a_module_are_pinned() -> None:
    found = plan("tiny-llama", "*.input_layernorm=S(1)", "tp=2", "pp=1")
    block = max(found.placements.values(), key=len)
    assert any(texts[1].endswith("->S(1)") for texts in block.values())


@pytest.mark.parametrize(
    ("force", "code", "says"),
    [
        ("layer.*.mlp=colwise", ExitCode.USAGE, "no parameter or module"),
        ("*.q_proj=row", ExitCode.USAGE, "no such placement"),
        ("*.q_proj=zp:R", ExitCode.USAGE, "no such axis"),
        ("*.norm.weight=S(3)", ExitCode.CONTRADICTION, "cannot lie so"),
        ("*.mlp.down_proj=S(1)", ExitCode.CONTRADICTION, "cannot lie so"),
    ],
)
def test_what_cannot_be_is_told(force: str, code: ExitCode, says: str) -> None:
    with pytest.raises(ShardwrightError, match=says) as caught:
        plan("tiny-llama", force)
    assert caught.value.exit_code == code
    assert caught.value.means and caught.value.change and caught.value.works


def test_a_split_needs_an_axis_to_split_over() -> None:
    with pytest.raises(ShardwrightError, match="tp=1") as caught:
        plan("tiny-llama", "*.q_proj=colwise", "tp=1")
    assert caught.value.exit_code == ExitCode.CONTRADICTION


@pytest.mark.parametrize(
    ("pattern", "name", "names", "covers"),
    [
        ("layers.*.mlp", "model.layers.3.mlp", True, True),
        ("layers.*.mlp", "model.layers.3.mlp.up_proj.weight", False, True),
        ("mlp", "model.layers.3.mlp", True, True),
        ("layers.1.*", "model.layers.10.mlp", False, False),
        ("*.weight", "lm_head.weight", True, True),
    ],
)
def test_patterns(pattern: str, name: str, names: bool, covers: bool) -> None:
    pin = Pin(pattern, "tp", "R")
    assert (pin.names(name), pin.covers(name)) == (names, covers)


def test_choices_are_no_pins() -> None:
    assert not any(is_pin(key, value) for key, value in [("pp", "2"), ("schedule", "1f1b"), ("recompute", "all")])
    assert Pins.parse({"lm_head": "dp:R"}, ["dp", "tp"]).pins[0].axis == "dp"
