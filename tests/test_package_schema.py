"""The published schema is the Plan's own, and a plan satisfies it."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema
import pytest

from shardwright.plans.document import MemoryPolicy, Plan, plan_json_schema
from shardwright.plans.document_checks import problem_of, seal


def published_schema() -> dict:
    return json.loads(resources.files("shardwright.plans").joinpath("plan.schema.json").read_text())


def test_published_schema_is_current():
    assert published_schema() == plan_json_schema(), "run tools/write_plan_schema.py"


def test_a_plan_satisfies_the_published_schema(hand_made_plan):
    jsonschema.validate(json.loads(hand_made_plan.to_json()), published_schema())


def test_a_plan_of_the_version_before_is_read(hand_made_plan, tmp_path):
    """It says of each segment whether it is recomputed whole, which this version says too."""
    document = json.loads(hand_made_plan.to_json())
    document["schema"] = "shardwright.plan/1"
    document["hashes"]["document"] = seal(document)
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(document))
    assert Plan.load(path).memory_policy == hand_made_plan.memory_policy


def test_a_plan_that_recomputes_what_it_does_not_place_is_refused(hand_made_plan):
    document = json.loads(hand_made_plan.to_json())
    document["memory_policy"]["recompute"]["block"] = ["no_such_op"]
    assert "no_such_op" in problem_of(document)


def test_a_policy_names_what_the_placements_have():
    """An op that a model lacks at another size of the batch is kept there."""
    policy = MemoryPolicy(
        recompute={"block": ("mm", "mm_1", "mul.0>kept"), "head": "all", "gone": ("mm",)},
        instances={1: ("mm_1", "mm"), 2: "all"},
    )
    found = policy.among({"block": {"mm": [], "mul.0>kept": []}, "head": {}}, ["block", "block", "block", "head"])
    assert found.recompute == {"block": ("mm", "mul.0>kept"), "head": "all", "gone": ()}
    assert found.instances == {1: ("mm",), 2: "all"}


def test_a_policy_of_an_instance_that_is_not_there_is_refused(hand_made_plan):
    document = json.loads(hand_made_plan.to_json())
    document["memory_policy"]["instances"] = {"99": "all"}
    assert "instances.99" in problem_of(document)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", 1),
        ("hosts", [1]),
        ("hosts", [{"device": 1}]),
        ("sources", {"measured": "two"}),
        ("notes", ["slow", True]),
        ("memory_limit_bytes", -1),
    ],
)
def test_hardware_that_cannot_be_read_is_refused(hand_made_plan, key, value):
    document = json.loads(hand_made_plan.to_json())
    document["hardware"][key] = value
    assert problem_of(document).startswith(f"hardware.{key}: ")
