"""One small model of each field, planned and compared with itself as written; benchmarks/models.py has them all."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from compared import assert_same_numbers, compared, plan_once

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import model_zoo
from models_page import FAMILY_LAYOUTS, FAMILY_PROCESSES

ROWS = [
    ("spectrogram", "zero=3"), ("clip", "pp=2"), ("dit", "tp=2"), ("gcn", "tp=2"), ("patchtst", "pp=2"),
    ("two_towers", "zero=3"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "layout"), ROWS)
def test_a_model_of_each_field_computes_the_same_on_two_ranks(name: str, layout: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers" if name in model_zoo.zoo_configs.DIFFUSERS else "transformers")
    spec = model_zoo.family_spec(model_zoo.FAMILY + name, tmp_path)
    plan = plan_once(spec, f"{FAMILY_PROCESSES}xCPU", FAMILY_LAYOUTS[layout])
    assert_same_numbers(compared(plan, tmp_path))
