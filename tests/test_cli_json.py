"""Under --json stdout is one JSON document, whatever a user's model and the libraries print there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from shardwright import cli
from shardwright.cli import make_parser

NOISY = """
import ctypes, os, torch
from torch import nn

print("imported")
os.write(1, b"written to the descriptor")
ctypes.CDLL(None).puts(b"printed by C")

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        print("forward")
        ctypes.CDLL(None).puts(b"forward of C")
        return self.a(x).square().mean()

def factory():
    print("made")
    torch.manual_seed(0)
    return Net(), {"x": torch.ones(4, 4)}
"""
MODEL = ["noisy.py:factory", "--hardware", "1xCPU", "--global-batch", "4"]
LINES = {
    "plan": [["plan", *MODEL], ["plan", *MODEL, "-o", "again.json"], ["plan", "plan.json"]],
    "explain": [["explain", "plan.json"], ["explain", "plan.json", "--why-not", "zero=0"]],
    "diff": [["diff", "plan.json", "plan.json"]],
    "run": [["run", "plan.json", "--steps", "1"]],  # one line a step
    "fits": [["fits", *MODEL], ["fits", *MODEL, "--only-answer"]],
    "check": [["check", *MODEL]],
    "schedule": [["schedule", "--ranks", "2", "--microbatches", "2", "--time-limit", "0.2"]],
    "models": [["models"]],
    "hardware": [["hardware"], ["hardware", "4xCPU"]],
    "profile": [["profile", "--hardware", "1xCPU", "--ops", "sum"]],
    "doctor": [["doctor"]],
}


def test_every_command_that_has_the_option_is_tried() -> None:
    commands = next(action for action in make_parser()._actions if action.dest == "command").choices
    assert set(LINES) == {name for name, parser in commands.items() if "--json" in parser._option_string_actions}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("json")
    (made / "noisy.py").write_text(NOISY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        assert cli.main(["plan", *MODEL, "-o", "plan.json"]) == 0
    return made


@pytest.mark.parametrize("command", LINES)
def test_stdout_is_one_document(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    if command == "profile":  # what it measured must not be what other tests plan with
        monkeypatch.setenv("SHARDWRIGHT_CACHE", str(folder))
    for line in LINES[command]:
        capfd.readouterr()
        assert cli.main([*line, "--json"]) == 0
        out, err = capfd.readouterr()
        assert json.loads(out) and "Traceback" not in err, (line, out, err)
