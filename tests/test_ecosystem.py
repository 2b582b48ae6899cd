"""The ecosystem's own clients train to the losses of the plain run, alone and on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matrix import cells

RUNS = Path(__file__).with_name("ecosystem_runs.py")
TOLERANCE = {"plain_loop": 1e-9, "fabric": 1e-9, "trainer": 1e-9, "lora": 1e-5}  # LoRA in float32, the rest in float64
HALF, OTHER = ["plain_loop", "lora"], ["fabric", "trainer"]
EVERY = [(num_processes, names) for num_processes in (1, 2) for names in (HALF, OTHER)]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("num_processes", "names"), cells(EVERY, [(1, HALF), (2, OTHER)]))
def test_losses_equal_those_of_the_plain_run(num_processes: int, names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="make setup installs it")
    found = tmp_path / "losses.json"
    start = [sys.executable]
    if num_processes > 1:
        start += ["-m", "torch.distributed.run", "--nproc-per-node", str(num_processes), "--rdzv-backend", "c10d",
                  "--rdzv-endpoint", "localhost:0", "--local-addr", "127.0.0.1"]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*start, str(RUNS), str(found), *names], env=environment, capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    losses = json.loads(found.read_text())
    assert list(losses) == names
    for name, row in losses.items():
        assert row["ours"] == pytest.approx(row["plain"], rel=TOLERANCE[name]), name
        assert len(set(row["ours"])) == len(row["ours"]), f"{name} does not train"
