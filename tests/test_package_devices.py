"""Device and process group come from the plan, on machines with GPUs too. CUDA is faked as available: 8 H100s that no
tensor can be put on, so that whatever chooses them by itself fails."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from compared import forked_launch
from distributed import run_ranks
from torch import nn

import shardwright
from shardwright import api, backend, cli, devices
from shardwright.errors import ExitCode, ShardwrightError
from shardwright.profiler.hardware import parse_hardware
from shardwright.units import GIB

NUM_GPUS = 8
LAUNCHER_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", *devices._LOCAL_RANK_NAMES)

# Run by every Python of a child process before anything else.
SITECUSTOMIZE = f"""
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: {NUM_GPUS}
"""


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many the process sees."""

    def set_number(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)

    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=79 * GIB)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index=0: properties)
    for name in LAUNCHER_NAMES:
        monkeypatch.delenv(name, raising=False)
    set_number(NUM_GPUS)
    return set_number


@pytest.fixture
def calls(monkeypatch):
    """What would be asked of CUDA and torch.distributed."""
    made = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(("set_device", device)))
    monkeypatch.setattr(dist, "init_process_group", lambda kind, **options: made.append((kind, options)))
    return made


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def mean_squared_error(output, batch):
    return (output - batch["y"]).square().mean()


def test_a_decorated_model_planned_for_a_cpu_trains_on_it_beside_gpus(gpus):
    made_by = shardwright.parallelize(hardware="1xCPU", loss=mean_squared_error, optimizer="SGD")(Net)
    model = made_by()
    batch = {"x": torch.ones(8, 4), "y": torch.zeros(8, 1)}
    first, second = model.step(batch), model.step(batch)
    assert second < first
    assert model.program.device == torch.device("cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}


def _train_beside_gpus(rank: int) -> tuple[list[float], str, str]:
    with (
        mock.patch("torch.cuda.is_available", lambda: True),
        mock.patch("torch.cuda.device_count", lambda: NUM_GPUS),
    ):
        torch.manual_seed(0)
        model = shardwright.parallelize(hardware="2xCPU", loss=mean_squared_error, optimizer="SGD")(Net)()
        batch = {"x": torch.ones(8, 4), "y": torch.zeros(8, 1)}
        losses = [float(model.step(batch)) for _ in range(2)]
        return losses, model.program.device.type, dist.get_backend()


def test_two_ranks_planned_for_cpus_train_on_them_beside_gpus():
    first, second = run_ranks(2, _train_beside_gpus)
    assert first == second
    losses, device, backend_name = first
    assert losses[1] < losses[0] and device == "cpu" and backend_name == "gloo"


def test_the_compiler_backend_judges_by_the_device_of_the_tensors(gpus, monkeypatch):
    """Dynamo itself cannot be run with CUDA faked: this is the one choice of the backend."""
    monkeypatch.setattr(backend, "CostModel", lambda cluster: pytest.fail("no tensor is on a GPU"))
    traced = torch.fx.symbolic_trace(Net())
    assert backend._fuse(traced, [torch.ones(8, 4)], backend.BackendOptions()) is traced


def test_local_is_one_device_to_a_script_and_the_machine_to_the_command_line(gpus, monkeypatch):
    assert devices.cluster_for_this_job("local").num_devices == 1
    assert parse_hardware("local").num_devices == NUM_GPUS
    workload = api.load_workload("preset:mlp", global_batch=8)
    plan = api.plan(workload, "local")
    assert plan.mesh.num_devices == 1 and plan.hardware["hosts"][0]["device"] == "H100-SXM-80GB"
    assert devices.device_of(plan) == torch.device("cuda", 0)
    monkeypatch.setenv("WORLD_SIZE", "16")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    job = devices.cluster_for_this_job("local")
    assert (job.num_devices, job.num_hosts) == (16, 2)


@pytest.mark.parametrize("hardware,expected", [("4xCPU", "cpu"), ("2x8xH100", "cuda"), ("8xMI300X", "cuda")])
@pytest.mark.parametrize("num_visible", [0, NUM_GPUS])
def test_the_device_type_is_that_of_the_hardware_whatever_is_there(gpus, hardware, expected, num_visible):
    gpus(num_visible)
    assert devices.device_type_of(hardware) == devices.device_type_of(parse_hardware(hardware)) == expected


@pytest.mark.parametrize(
    "num_visible,environment,index",
    [
        (8, {"LOCAL_RANK": "3"}, 3),
        (8, {"SLURM_LOCALID": "5"}, 5),
        (8, {}, 0),
        (1, {"LOCAL_RANK": "3"}, 0),  # CUDA_VISIBLE_DEVICES shows each process its own GPU
        (1, {"SLURM_LOCALID": "7"}, 0),
    ],
)
def test_a_process_takes_the_gpu_that_is_its_own(gpus, calls, monkeypatch, num_visible, environment, index):
    gpus(num_visible)
    for name, value in {**environment, "RANK": "11", "WORLD_SIZE": "16"}.items():
        monkeypatch.setenv(name, value)
    device = torch.device("cuda", index)
    assert devices.join_torchrun("2x8xH100") == device
    (set_device, chosen), (kind, options) = calls
    assert (set_device, chosen) == ("set_device", device)
    assert kind == "nccl" and options["device_id"] == device


def test_a_job_planned_for_cpus_joins_by_gloo_and_touches_no_gpu(gpus, calls, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert devices.join_torchrun("4xCPU") == torch.device("cpu")
    [(kind, options)] = calls
    assert kind == "gloo" and options["device_id"] is None


def test_more_processes_than_gpus_and_no_gpu_are_refused_by_number(gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    gpus(2)
    with pytest.raises(ShardwrightError, match="process 3 of its host, which shows it 2 GPUs") as caught:
        devices.device_of("8xH100")
    assert caught.value.works == "torchrun --nproc-per-node 2 SCRIPT" and caught.value.exit_code == 7
    gpus(0)
    with pytest.raises(ShardwrightError, match="sees no GPU") as caught:
        devices.device_of("8xH100")
    assert caught.value.exit_code == ExitCode.PLAN_MISMATCH


@pytest.mark.parametrize(
    "backends,device,fits",
    [
        ("cpu:gloo,cuda:gloo", "cpu", True),
        ("cpu:gloo,cuda:gloo", "cuda:0", False),
        ("cuda:nccl", "cpu", False),
        ("cuda:nccl", "cuda:0", True),
        ("cpu:gloo,cuda:nccl", "cpu", True),
        ("cpu:gloo,cuda:nccl", "cuda:0", True),
    ],
)
def test_a_process_group_that_cannot_carry_the_plans_tensors_is_refused(monkeypatch, backends, device, fits):
    monkeypatch.setattr(dist, "get_backend_config", lambda: backends)
    if fits:
        devices.check_group(torch.device(device))
        return
    with pytest.raises(ShardwrightError, match=backends) as caught:
        devices.check_group(torch.device(device))
    assert caught.value.exit_code == ExitCode.PLAN_MISMATCH and "init_process_group" in caught.value.works


def test_plan_run_and_check_for_cpus_work_beside_gpus(gpus, tmp_path, monkeypatch, capsys):
    """As in the README; the run's worker is another process, whose CUDA is faked as well."""
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    plan = str(tmp_path / "plan.json")
    options = ["--hardware", "1xCPU", "--global-batch", "4"]
    assert cli.main(["plan", "preset:mlp", *options, "-o", plan]) == 0
    assert cli.main(["run", plan, "--steps", "1"]) == 0
    capsys.readouterr()
    monkeypatch.setattr("shardwright.checking.launch", forked_launch)
    assert cli.main(["check", plan, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
