"""`run` and `check` on local processes: losses, what a dead rank leaves, errors of a rank, the loopback interface."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from shardwright import api, checking, cli
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.launch import launch
from shardwright.plans.document import Plan
from shardwright.profiler.models import load_workload


def make_plan(model: str, folder: Path, ranks: int = 2, **options) -> Path:
    workload = load_workload(model, global_batch=4, precision="float32", **options)
    api.plan(workload, f"{ranks}xCPU", force={"dp": ranks, "zero": ranks - 1}).save(folder / "plan.json")
    return folder / "plan.json"


@pytest.fixture(scope="module")
def plan_path(tmp_path_factory) -> Path:
    return make_plan("preset:mlp", tmp_path_factory.mktemp("plan"))


def worker_pids() -> list[int]:
    """Workers that this test process's launcher started."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if b"shardwright.worker" in words and parent == os.getpid():
            found.append(int(entry.name))
    return sorted(found)


def sockets_beyond_loopback(pid: int) -> list[str]:
    """Local addresses of this process's listening TCP sockets that are not on the loopback interface."""
    inodes = set()
    for link in (Path("/proc") / str(pid) / "fd").iterdir():
        try:
            target = os.readlink(link)
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    outside = []
    for name in ("tcp", "tcp6"):
        for line in (Path("/proc") / str(pid) / "net" / name).read_text().splitlines()[1:]:
            words = line.split()
            listening = words[3] == "0A"
            address = words[1].split(":")[0]
            loopback = address in ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
            if listening and words[9] in inodes and not loopback:
                outside.append(words[1])
    return outside


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at /proc")
def test_a_dead_rank_ends_the_run_and_is_named(plan_path):
    killed: list[float] = []
    outside: list[str] = []

    def kill_one(event):
        if event["event"] == "step" and not killed:
            killed.append(time.monotonic())
            for pid in [*worker_pids(), os.getpid()]:
                outside.extend(sockets_beyond_loopback(pid))
            os.kill(worker_pids()[1], signal.SIGKILL)

    with pytest.raises(ShardwrightError, match=r"rank \d of 2 ended with signal SIGKILL") as caught:
        launch({"task": "run", "plan": str(plan_path), "steps": 100_000}, 2, kill_one)
    assert time.monotonic() - killed[0] < 30
    assert caught.value.exit_code == ExitCode.INTERNAL
    assert not worker_pids()
    assert not outside


def test_a_users_mistake_in_a_rank_keeps_its_exit_code(tmp_path, capsys):
    plan = Plan.load(make_plan("preset:mlp", tmp_path, ranks=1))
    other = plan.model_copy(update={"hashes": plan.hashes.model_copy(update={"model": "0" * 16})})
    other.save(tmp_path / "other.json")
    code = cli.main(["run", str(tmp_path / "other.json"), "--steps", "1"])
    out, err = capsys.readouterr()
    assert code == ExitCode.PLAN_MISMATCH
    assert "0000000000000000" in err and "Traceback" not in err and not out


@pytest.mark.usefixtures("forked")
def test_run_prints_json_lines_with_what_was_measured_and_predicted(tmp_path, capsys):
    plan_path = make_plan("preset:tiny-llama", tmp_path, seq_len=8)
    text = tmp_path / "text.txt"
    text.write_text("We hold these truths to be self-evident. " * 20)
    trace = tmp_path / "trace.json"
    options = ["--steps", "3", "--text", str(text), "--trace", str(trace), "--json"]
    assert cli.main(["run", str(plan_path), *options]) == 0
    out, _ = capsys.readouterr()
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[-1]["loss"] < rows[0]["loss"]
    for row in rows:
        assert row["step_s"] > 0 and row["predicted_step_s"] > 0 and row["tokens_per_s"] > 0
        assert len(row["peak_bytes"]) == 2 and min(row["peak_bytes"]) > 0
    events = [row for row in json.loads(trace.read_text())["traceEvents"] if row["ph"] == "X"]
    names = {
        row["args"]["name"] for row in json.loads(trace.read_text())["traceEvents"] if row["name"] == "process_name"
    }
    assert names == {f"rank {rank} {source}" for rank in range(2) for source in ("predicted", "measured")}
    kinds = [sorted(row["name"] for row in events if row["pid"] == pid and row["cat"] == "compute") for pid in range(4)]
    assert all(kinds) and kinds[0::2] == kinds[1::2], "the same actions, predicted and measured"


def test_a_plan_for_gpus_is_refused_where_there_are_none(plan_path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plan = Plan.load(plan_path)
    hosts = [{**plan.hardware["hosts"][0], "device": "H100-SXM-80GB"}]
    plan.model_copy(update={"hardware": {**plan.hardware, "hosts": hosts}}).save(tmp_path / "gpu.json")
    assert cli.main(["run", str(tmp_path / "gpu.json")]) == ExitCode.PLAN_MISMATCH
    assert "shardwright check PLAN.json" in capsys.readouterr().err


def test_check_compares_and_prints_one_json_object(capsys):
    arguments = ["check", "preset:mlp", "--hardware", "2xCPU", "--force", "dp=2", "--force", "zero=3", "--json"]
    assert cli.main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["loss_rel_err"] <= 1e-9 and found["max_grad_rel_err"] <= 1e-9
    assert found["mesh"]["dp"] == 2 and found["schedule"]["name"] and found["worst_parameter"]


def test_check_notices_a_gradient_that_differs(hand_made_plan):
    right = checking.CheckResult(hand_made_plan, 1e-16, {"a": 1e-15, "b": 3e-16})
    wrong = checking.CheckResult(hand_made_plan, 1e-16, {"a": 1e-15, "b": 3e-9})
    missing = checking.CheckResult(hand_made_plan, 1e-16, {"a": float("inf")})
    assert right.ok and not wrong.ok and not missing.ok
    assert wrong.worst_parameter == "b" and wrong.to_json()["max_grad_rel_err"] == 3e-9
    assert not checking.CheckResult(hand_made_plan, 0.0, {}).ok


@pytest.mark.parametrize(
    "name", ["llama-3-8b", "bert-large", "t5-large", "vit-l", "mixtral-8x7b", "qwen3-8b", "mistral-7b"]
)
def test_big_models_are_shrunk_and_keep_their_kind(name):
    from shardwright.profiler.models import reload_workload

    spec = load_workload(f"preset:{name}", global_batch=8).spec
    small = reload_workload(checking.shrink(spec))
    big = reload_workload(spec)
    assert sum(p.numel() for p in small.model.parameters()) < checking.SMALL_PARAMS
    assert type(small.model) is type(big.model)


def test_a_plan_is_scaled_down_with_its_axes_kept(hand_made_plan):
    mesh = hand_made_plan.mesh.model_copy(update={"pp": 8, "dp": 4, "tp": 8})
    force = checking.scale_down(hand_made_plan.model_copy(update={"mesh": mesh, "zero": 3}))
    assert force == {"pp": "2", "dp": "1", "cp": "1", "tp": "2", "zero": "0", "schedule": "1f1b", "recompute": "all"}
    eight = checking.scale_down(hand_made_plan.model_copy(update={"mesh": mesh, "zero": 3}), num_processes=8)
    assert (eight["pp"], eight["dp"], eight["tp"], eight["zero"]) == ("2", "2", "2", "3")
