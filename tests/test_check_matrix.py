"""Program and single-device model agree in float64, loss and every gradient, for small models on every kind of layout.

Every layout and every model appears; `make test-all` runs every model on every layout.
benchmarks/check_matrix.py runs the same through `shardwright check` itself and writes the figures down.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from compared import assert_same_numbers, compared, plan_once
from matrix import cells

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
from check_matrix import LAYOUTS, MODELS, spec


def _each_once() -> list[tuple[str, str]]:
    """Every layout once, on the models in turn: the two largest get layouts of two ranks."""
    return [(MODELS[k % len(MODELS)], layout) for k, layout in enumerate(LAYOUTS)]


@pytest.mark.parametrize(
    ("model", "layout"), cells([(model, layout) for model in MODELS for layout in LAYOUTS], _each_once())
)
def test_program_computes_what_the_model_computes(model: str, layout: str, tmp_path: Path) -> None:
    chosen = LAYOUTS[layout]
    plan = plan_once(spec(model), f"{chosen.processes}xCPU", chosen.force)
    for axis in {"pp", "dp", "tp", "zero"} & set(chosen.force):
        made = plan.zero if axis == "zero" else getattr(plan.mesh, axis)
        assert made == int(chosen.force[axis]), axis
    assert plan.microbatch.count >= 4 or "global_microbatch" not in chosen.force
    assert_same_numbers(compared(plan, tmp_path))
