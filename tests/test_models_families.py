"""One small model of each field, planned and compared with itself as written; benchmarks/models.py has them all."""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import pytest
from distributed import run_ranks
from test_check_matrix import _compare, _once

from shardwright import api, tasks
from shardwright.checking import TOLERANCE

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
    with mock.patch.object(api, "capture", _once(api.capture)):
        plan = api.plan(tasks.check_workload(spec), f"{FAMILY_PROCESSES}xCPU", force=FAMILY_LAYOUTS[layout])
    path = tmp_path / "plan.json"
    plan.save(path)
    found = run_ranks(FAMILY_PROCESSES, _compare, str(path))[0]
    for loss, expected in zip(found["losses"], found["reference_losses"], strict=True):
        assert abs(loss - expected) <= TOLERANCE * abs(expected)
    assert found["gradients"] and all(error <= TOLERANCE for error in found["gradients"].values())
