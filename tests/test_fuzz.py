"""Seeded faults in command lines, plans and hardware files: always an answer, never an internal error or a hang.

A short run by default; SHARDWRIGHT_FUZZ=1000 tries as many of each.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzzing import command_line, mutated, mutated_text, text_of
from fuzzing_run import complaint, run

from shardwright import api
from shardwright.errors import ExitCode
from shardwright.profiler.models import load_workload

COUNT = int(os.environ.get("SHARDWRIGHT_FUZZ", "0"))
FIRST = int(os.environ.get("SHARDWRIGHT_FUZZ_SEED", "0"))
TOML = """
name = "lab"
[[hosts]]
count = 2
devices = "8xA100-SXM-80GB"
network_link = { name = "InfiniBand-HDR", gb_per_s = 21.5, latency_us = 6, source = "ib_write_bw", date = "2026-03-01" }
host_memory_gib = 1024
nvme_gib = 14000
nvme_gb_per_s = 20

[[hosts]]
devices = "4xL40S"
network_link = "Ethernet-25"

[[links]]
hosts = [0, 1]
gb_per_s = 3.0
latency_us = 40
"""
CANARY = "from pathlib import Path\n\nPath(__file__).with_name('imported').touch()\n"
OWN = """
import torch
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x, labels):
        return nn.functional.cross_entropy(self.down(self.up(x).relu()), labels)

def factory():
    return Model(), {"x": torch.randn(4, 8), "labels": torch.zeros(4, dtype=torch.int64)}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a small plan and a hardware file in it; commands run there."""
    made = tmp_path_factory.mktemp("fuzz")
    workload = load_workload("preset:tiny-gpt2", global_batch=8, seq_len=8, overrides={"num_layers": 2})
    api.plan(workload, "4xCPU", force={"pp": 2, "tp": 2}).save(made / "plan.json")
    (made / "lab.toml").write_text(TOML)
    (made / "canary.py").write_text(CANARY)  # imported by none
    (made / "own.py").write_text(OWN)  # a model to name on the command line
    return made


def _seeds(short: int) -> range:
    return range(FIRST, FIRST + (COUNT or short))


@pytest.fixture(autouse=True)
def nothing_is_executed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Commands run in the folder, where a module lies that leaves a trace if it is imported."""
    monkeypatch.chdir(folder)
    yield
    assert not (folder / "imported").exists()


def test_command_lines(folder: Path) -> None:
    found = {}
    plan, hardware = (folder / "plan.json").read_text(), (folder / "lab.toml").read_text()
    for seed in _seeds(40):
        (folder / "plan.json").write_text(plan)  # an earlier line may have written there
        (folder / "lab.toml").write_text(hardware)
        line = command_line(random.Random(seed), str(folder / "plan.json"), str(folder / "lab.toml"))
        if problem := complaint(line, *run(line)):
            found[seed] = (line, problem)
    assert not found, "\n".join(f"{seed}: {line}\n    {problem}" for seed, (line, problem) in found.items())


def test_mutated_plans_are_refused_whole(folder: Path) -> None:
    import json

    original = json.loads((folder / "plan.json").read_text())
    found = {}
    for seed in _seeds(60):
        generator = random.Random(seed)
        document = mutated(original, generator)
        if text_of(document) == text_of(original):
            continue
        path = folder / "mutated.json"
        path.write_text(text_of(document))
        line = generator.choice(
            [["plan", str(path)], ["plan", str(path), "--json"], ["diff", str(path), str(folder / "plan.json")],
             ["explain", str(path)], ["run", str(path), "--steps", "1"], ["check", str(path)]]
        )  # fmt: skip
        code, out, err = run(line)
        problem = complaint(line, code, out, err)
        if problem or code != ExitCode.PLAN_MISMATCH or out:
            found[seed] = (line, problem or f"exit code {code}: {(out or err)[:200]}")
    assert not found, "\n".join(f"{seed}: {line}\n    {problem}" for seed, (line, problem) in found.items())


def test_sealed_nonsense_is_refused_too(folder: Path) -> None:
    """A document that agrees with its seal but not with itself or with the model."""
    import json

    from shardwright.plans.document_checks import seal

    original = json.loads((folder / "plan.json").read_text())
    found = {}
    for seed in _seeds(25):
        generator = random.Random(seed)
        document = mutated(original, generator)
        try:
            document["hashes"]["document"] = seal(document)
        except (KeyError, TypeError, AttributeError):
            continue
        path = folder / "sealed.json"
        path.write_text(text_of(document))
        command = generator.choice([["plan", str(path)], ["diff", str(path), str(path)], ["explain", str(path)]])
        if problem := complaint(command, *run(command)):
            found[seed] = (command, problem)
    assert not found, "\n".join(f"{seed}: {line}\n    {problem}" for seed, (line, problem) in found.items())


def test_hardware_files(folder: Path) -> None:
    found = {}
    for seed in _seeds(60):
        path = folder / "mutated.toml"
        path.write_text(mutated_text(TOML, random.Random(seed)))
        line = ["hardware", str(path)]
        if problem := complaint(line, *run(line)):
            found[seed] = (path.read_text(), problem)
    assert not found, "\n".join(f"{seed}: {problem}\n{text}" for seed, (text, problem) in found.items())
