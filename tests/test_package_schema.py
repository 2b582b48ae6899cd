"""The published schema is the Plan's own, and a plan satisfies it."""

from __future__ import annotations

import json
from importlib import resources

import jsonschema

from shardwright.plans.document import plan_json_schema


def published_schema() -> dict:
    return json.loads(resources.files("shardwright.plans").joinpath("plan.schema.json").read_text())


def test_published_schema_is_current():
    assert published_schema() == plan_json_schema(), "run tools/write_plan_schema.py"


def test_a_plan_satisfies_the_published_schema(hand_made_plan):
    jsonschema.validate(json.loads(hand_made_plan.to_json()), published_schema())
