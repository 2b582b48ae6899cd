"""What has bitten planners before: each model on several layouts against the model as written, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
from awkward_models import MODELS
from compared import assert_same_numbers, compared, plan_once
from matrix import cells

from shardwright.errors import ExitCode, ShardwrightError

LAYOUTS = (
    {"pp": "1", "tp": "4"},
    {"pp": "1", "dp": "2", "tp": "2"},
    {"pp": "2", "dp": "2"},
    {"pp": "1", "dp": "4", "zero": "3"},
)


def plan_of(name: str, layout: dict[str, str], batch: int = 8):
    spec = {"model": f"awkward_models:{name}", "kind": "factory", "global_batch": batch}
    return plan_once(spec, "4xCPU", layout)


EVERY = [(name, layout) for name in MODELS for layout in LAYOUTS]


@pytest.mark.parametrize(
    ("name", "layout"),
    cells(EVERY, EVERY[:: len(LAYOUTS) + 1] + EVERY[-1:]),
    ids=lambda value: value if isinstance(value, str) else " ".join(f"{k}={v}" for k, v in value.items()),
)
def test_numbers_are_those_of_the_model_as_written(name: str, layout: dict[str, str], tmp_path: Path) -> None:
    assert_same_numbers(compared(plan_of(name, layout), tmp_path))


def test_a_batch_that_does_not_divide(tmp_path: Path) -> None:
    assert_same_numbers(compared(plan_of("uneven_heads", {"pp": "1", "tp": "4"}, batch=7), tmp_path))


@pytest.mark.parametrize(("name", "line"), [("branches", "if y.sum() > 0"), ("sizes", ".item()")])
def test_control_flow_on_data_is_refused_with_its_line(name: str, line: str) -> None:
    with pytest.raises(ShardwrightError) as caught:
        plan_of(name, {})
    assert caught.value.exit_code == ExitCode.UNSUPPORTED_MODEL
    source = Path(__file__).with_name("awkward_models.py")
    number = next(k for k, text in enumerate(source.read_text().splitlines(), 1) if line in text)
    assert f"awkward_models.py:{number}" in str(caught.value)
