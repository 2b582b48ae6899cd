"""The command line without processes: options, exit codes, the four-part messages, JSON on stdout and nothing else."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest

from shardwright import checking, cli, reasons
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.plans.document import Plan


def run_main(capsys, *arguments: str) -> tuple[int, str, str]:
    code = cli.main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


def test_models_lists_presets_with_their_parameter_counts(capsys):
    code, out, err = run_main(capsys, "models")
    assert code == 0 and not err
    for line in ("preset:llama-3-8b 8.03B", "preset:gpt2 124.44M", "preset:mixtral-8x7b 46.70B"):
        assert line in " ".join(out.split()), line


@pytest.mark.parametrize("arguments", [("models",), ("hardware",), ("hardware", "2x8xH100-80GB"), ("doctor",)], ids=str)
def test_json_is_all_there_is_on_stdout(capsys, arguments):
    code, out, _ = run_main(capsys, *arguments, "--json")
    assert code == 0
    assert json.loads(out)


def test_what_libraries_print_does_not_reach_stdout_under_json(capfd, monkeypatch):
    from shardwright.commands import _options, models

    def noisy(args):
        print("from Python")
        ctypes.CDLL(None).puts(b"from C")
        os.write(1, b"from the operating system")
        _options.print_json({"noise": 0})
        return 0

    monkeypatch.setattr(models, "execute", noisy)
    assert cli.main(["models", "--json"]) == 0
    print("after")
    out, err = capfd.readouterr()
    assert out.splitlines() == ["{", ' "noise": 0', "}", "after"]
    assert all(part in err for part in ("from Python", "from C", "from the operating system"))


def test_the_integer_solver_prints_no_banner():
    code = (
        "import pulp; from shardwright.planner.solver import solve_model as solve;"
        "model = pulp.LpProblem('m', pulp.LpMinimize); model += -pulp.LpVariable('x', 0, 3, cat='Integer');"
        "print(solve(model).objective)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("-3.0\n", "")


TINY = ("plan", "preset:tiny-gpt2", "--hardware", "4xCPU", "--global-batch")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("plna",), "did you mean plan"),
        (("plan", "preset:gpt2", "--globl-batch", "8"), "did you mean --global-batch"),
        (("plan", "preset:gpt2", "--global-batch", "8"), "--hardware 4xCPU"),
        (("plan", "preset:gpt2", "--hardware", "4xCPU"), "--global-batch 8"),
        (("plan", "preset:gpt", "--hardware", "4xCPU", "--global-batch", "8"), "preset:gpt2"),
        (("plan", "preset:gpt2", "--hardware", "4xH1000", "--global-batch", "8"), "H100"),
        ((*TINY, "8", "--force", "shedule=1f1b"), "schedule"),
        ((*TINY, "8", "--force", "pp"), "KEY=VALUE"),
        ((*TINY, "x"), "--global-batch"),
        ((*TINY, "8", "--memory-limit", "lots"), "600MiB"),
        ((*TINY, "8", "-o", "/no/folder/plan.json"), "/no/folder"),
        (("plan", "no/plan.json"), "no/plan.json"),
        (("plan",), "MODEL"),
        ((), "COMMAND"),
        (("run", "no.json"), "no.json"),
    ],
)
def test_mistakes_are_usage_errors_that_name_what_would_work(capsys, arguments, expected):
    code, out, err = run_main(capsys, *arguments)
    assert code == ExitCode.USAGE
    assert not out
    assert err.startswith("error: ") and expected in err, err
    assert "Traceback" not in err


def test_force_given_twice_with_different_values_is_refused(capsys):
    code, _, err = run_main(capsys, "plan", "preset:tiny-gpt2", "--hardware", "4xCPU", "--global-batch", "8",
                            "--force", "pp=2", "--force", "pp=4")  # fmt: skip
    assert code == ExitCode.USAGE and "given twice" in err


def test_a_plan_of_another_schema_is_refused_with_exit_code_7(capsys, tmp_path, hand_made_plan):
    path = tmp_path / "plan.json"
    path.write_text(hand_made_plan.to_json().replace("shardwright.plan/2", "shardwright.plan/0"))
    for command in ("plan", "run", "check"):
        code, _, err = run_main(capsys, command, str(path))
        assert code == ExitCode.PLAN_MISMATCH and "shardwright.plan/0" in err


def test_a_saved_plan_is_shown_again(capsys, tmp_path, hand_made_plan):
    path = tmp_path / "plan.json"
    hand_made_plan.save(path)
    code, out, _ = run_main(capsys, "plan", str(path))
    assert code == 0 and "preset:demo-llama on 4xCPU" in out
    code, out, _ = run_main(capsys, "plan", str(path), "--json")
    assert code == 0 and json.loads(out)["schema"] == "shardwright.plan/2"


@pytest.mark.parametrize("exit_code", list(ExitCode)[2:])
def test_each_error_ends_with_its_exit_code(capsys, monkeypatch, exit_code):
    def fail(_):
        raise ShardwrightError(
            "it broke at 3", means="three is too many", change="--n", works="--n 2", exit_code=exit_code
        )

    monkeypatch.setattr("shardwright.commands.models.execute", fail)
    code, out, err = run_main(capsys, "models", "--json")
    assert code == exit_code and not out
    assert err.splitlines() == [
        "error: it broke at 3",
        "what it means: three is too many",
        "change: --n",
        "would work: --n 2",
    ]


def test_an_internal_error_is_one_line_and_debug_shows_the_traceback(capsys, monkeypatch):
    def fail(_):
        raise KeyError("a\nb")

    monkeypatch.setattr("shardwright.commands.models.execute", fail)
    code, _, err = run_main(capsys, "models")
    assert code == ExitCode.INTERNAL and err.count("\n") == 1 and "--debug" in err
    code, _, err = run_main(capsys, "models", "--debug")
    assert code == ExitCode.INTERNAL and "Traceback" in err


def test_interruption_is_one_line(capsys, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("shardwright.commands.models.execute", interrupt)
    assert run_main(capsys, "models") == (cli.INTERRUPTED, "", "shardwright: interrupted\n")


def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m shardwright models | head -1"
    done = subprocess.run(["bash", "-c", "set -o pipefail; " + command], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr


@pytest.mark.parametrize("arguments", [("--help",), ("--version",), ("plan", "--help"), ("models",)], ids=str)
def test_answers_without_importing_torch(arguments):
    code = (
        "import sys\nfrom shardwright.cli import main\n"
        f"try: main({list(arguments)!r})\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules or sys.argv[1:] == ['torch'], 'torch was imported'\n"
    )
    may_import = ["torch"] if arguments == ("models",) else []
    environment = {**os.environ, "COLUMNS": "80"}
    subprocess.run(
        [sys.executable, "-c", code, *may_import], check=True, timeout=60, env=environment, capture_output=True
    )


def test_diff_and_show_refuse_an_edited_plan(capsys, tmp_path, hand_made_plan):
    path = tmp_path / "plan.json"
    hand_made_plan.save(path)
    edited = tmp_path / "edited.json"
    edited.write_text(path.read_text().replace('"step_s": 1.25', '"step_s": 0.25'))
    for arguments in (("plan", str(edited)), ("diff", str(path), str(edited)), ("run", str(edited))):
        code, out, err = run_main(capsys, *arguments)
        assert code == ExitCode.PLAN_MISMATCH and not out and "not as it was made" in err
    assert run_main(capsys, "diff", str(path), str(path))[0] == 0


FACTORY = """
import pathlib

import torch
from torch import nn

pathlib.Path({flag!r}).touch()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return self.a(x).square().mean()


def make():
    return Net(), {{"x": torch.ones(4, 4)}}
"""


def test_a_plan_runs_code_that_its_user_chose_alone(capsys, tmp_path, monkeypatch):
    flag, source, path = tmp_path / "imported", tmp_path / "mine.py", tmp_path / "plan.json"
    source.write_text(FACTORY.format(flag=str(flag)))
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "mine"))
    code, _, err = run_main(
        capsys, "plan", f"{source}:make", "--hardware", "1xCPU", "--global-batch", "4", "-o", str(path)
    )
    assert code == 0, err
    code, _, err = run_main(capsys, "explain", str(path))
    assert code == 0 and f"importing {source}:make" in err
    monkeypatch.setenv("SHARDWRIGHT_CACHE", str(tmp_path / "of another user"))
    flag.unlink()
    for command in ("explain", "run", "check"):
        code, out, err = run_main(capsys, command, str(path))
        assert code == ExitCode.PLAN_MISMATCH and not out and f"import and call {source}:make" in err, err
    plan = Plan.load(path)
    for function in (reasons.explain, lambda plan: reasons.why_not(plan, {"tp": "1"}), checking.check_plan):
        with pytest.raises(ShardwrightError, match="import and call") as caught:
            function(plan)
        assert caught.value.works == "trust_model=True" and caught.value.exit_code == ExitCode.PLAN_MISMATCH
    assert not flag.exists()
    assert reasons.explain(plan, trust_model=True).rows and flag.exists()
    code, _, err = run_main(capsys, "explain", str(path), "--trust-model")
    assert code == 0 and flag.exists(), err


def test_a_plan_that_does_not_say_how_its_model_is_made_is_refused(capsys, tmp_path, hand_made_plan):
    """Sealed, so that nothing else is wrong with it."""
    path = tmp_path / "plan.json"
    for workload in ({}, {"model": "Net"}, {"model": None, "kind": "factory"}):
        hand_made_plan.model_copy(update={"workload": {**workload, "global_batch": 4}}).save(path)
        for command in (["explain", path], ["explain", path, "--why-not", "tp=2"], ["run", path], ["check", path]):
            code, out, err = run_main(capsys, *map(str, command))
            assert code == ExitCode.PLAN_MISMATCH and not out and err.startswith("error: "), (command, err)


DATA_DEPENDENT = {
    "branch": "if x.sum() > 0: return self.a(x).sum()",
    "size": "return self.a(x)[:int(x.sum().item())].sum()",
    "selection": "return self.a(x[x > 0].view(-1, 4)).sum()",
    "nonzero": "return self.a(x)[x[:, 0].nonzero()[:, 0]].sum()",
    "loop": "return sum(self.a(row).sum() for row in x.unique(dim=0))",
    "failure": "raise RuntimeError('of its own')",
}


@pytest.mark.parametrize("line", DATA_DEPENDENT.values(), ids=DATA_DEPENDENT.keys())
def test_what_depends_on_data_is_refused_by_line_and_nothing_else_is_printed(capfd, line, tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(FACTORY.format(flag=str(tmp_path / "flag")).replace("return self.a(x).square().mean()", line))
    number = next(n for n, text in enumerate(source.read_text().splitlines(), 1) if line in text)
    code = cli.main(["plan", f"{source}:make", "--hardware", "1xCPU", "--global-batch", "4"])
    out, err = capfd.readouterr()
    assert code == ExitCode.UNSUPPORTED_MODEL, err
    assert not out and err.startswith("error: ") and f"mine.py:{number}" in err, err
