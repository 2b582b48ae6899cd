"""Writes plans/plan.schema.json from plans/document.py. Run after changing the Plan."""

from __future__ import annotations

import json
from pathlib import Path

from shardwright.plans.document import plan_json_schema

PATH = Path(__file__).parent.parent / "plans" / "plan.schema.json"


def schema_text() -> str:
    return json.dumps(plan_json_schema(), indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    PATH.write_text(schema_text())
