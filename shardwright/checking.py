"""check: does the program that a plan becomes compute what the model as written computes?

Both run in float64 on small shapes, the program on local processes, and the loss and every gradient are compared.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import api, trust
from .launch import Event, launch
from .plans.axes import MeshShape, easiest_first, expert_axes, free_axis, inner_axes, sequence_axes, stage_axes
from .plans.document import Plan
from .profiler import diffusion
from .profiler.batch_dims import with_batch_dims
from .profiler.hardware import parse_hardware
from .profiler.hf import text_config
from .profiler.hf_overrides import knows, parts_of
from .profiler.models import reload_workload
from .profiler.workload import Workload
from .self_test import is_applicable
from .self_test import self_test as run_self_test
from .tasks import TOLERANCE, check_workload

SMALL_PARAMS = 2_000_000  # models up to this size are checked as they are
SMALL_SEQ_LEN = 16
SMALL_IMAGE_TOKENS = 32  # a small image's placeholders, beside the text
DEFAULT_PROCESSES = 4
# What a big transformers model is shrunk to. Keys that a family lacks are left out.
SMALL_SETTINGS: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 131,
    "head_dim": 8,
    "d_kv": 8,
    "num_local_experts": 4,
    "sliding_window": 6,
    "image_size": 16,
    "patch_size": 4,
}


@dataclass(frozen=True)
class CheckResult:
    """Relative errors of the loss and of each parameter's gradient, the worse of two steps."""

    plan: Plan
    loss_rel_err: float
    gradient_errors: dict[str, float]

    @property
    def max_grad_rel_err(self) -> float:
        return max(self.gradient_errors.values(), default=0.0)

    @property
    def worst_parameter(self) -> str:
        return max(self.gradient_errors, key=self.gradient_errors.__getitem__, default="")

    @property
    def ok(self) -> bool:
        return bool(self.gradient_errors) and max(self.loss_rel_err, self.max_grad_rel_err) <= TOLERANCE

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "loss_rel_err": _json_number(self.loss_rel_err),
            "max_grad_rel_err": _json_number(self.max_grad_rel_err),
            "worst_parameter": self.worst_parameter,
            "mesh": self.plan.mesh.model_dump(),
            "schedule": self.plan.schedule.model_dump(),
            "zero": self.plan.zero,
            "microbatch": self.plan.microbatch.model_dump(),
            "split": self.plan.predicted.split,
            "num_parameters": len(self.gradient_errors),
        }


def _json_number(value: float) -> float | None:
    return value if math.isfinite(value) else None


def check(
    spec: Mapping[str, Any],
    hardware: str,
    *,
    force: Mapping[str, Any] | None = None,
    progress: api.Progress | None = None,
    debug: bool = False,
    self_test: bool = True,
) -> CheckResult:
    """spec: as in Workload.spec: {"model": "preset:gpt2", "global_batch": 8, ...}; shrunk where the model is big.
    self_test: of a user's own model also as it is, in its own dtype: what is compared below is a copy in float64."""
    say = progress or (lambda message: None)
    if self_test and spec.get("kind") == "factory":
        _test_untouched(reload_workload(spec), say)
    workload = check_workload(shrink(spec))
    forced = _split_state(_fill_pipeline(force or {}, workload.global_batch))
    plan = api.plan(workload, parse_hardware(hardware), force=forced, self_test=self_test, progress=progress)
    say(f"running on {plan.mesh.num_devices} processes")
    return run_check(plan, debug=debug)


def _test_untouched(workload: Workload, say: api.Progress) -> None:
    if workload.precision.compute == torch.float64 or not is_applicable(workload):
        return
    say(f"self-test of {workload.name} as it is")
    workload = with_batch_dims(workload)
    run_self_test(workload, api.capture_for_planning(workload))


def _fill_pipeline(force: Mapping[str, Any], global_batch: int) -> dict[str, Any]:
    """A pipeline without a microbatch asked for gets two for each stage: times of toy sizes would not choose them. Cut
    sequences come one at a time as it is."""
    stages, ranks = _asked(force, stage_axes()[0]), _asked(force, free_axis())
    size, rest = divmod(global_batch, 2 * stages)
    given = {"microbatch", "global_microbatch"} & set(force) or any(_asked(force, axis) > 1 for axis in sequence_axes())
    if stages == 1 or given or rest or size == 0 or size % max(ranks, 1):
        return dict(force)
    return {**force, "global_microbatch": size}


def _split_state(force: Mapping[str, Any]) -> dict[str, Any]:
    """A tensor axis that is asked for splits parameters wherever it can, a context axis sequences, and an expert axis
    experts: times of toy sizes would split the batch, or nothing."""
    is_asked = any(_asked(force, axis) > 1 for axis in (*inner_axes(), *expert_axes()))
    return {**({"prefer": "memory"} if is_asked else {}), **force}


def _asked(force: Mapping[str, Any], axis: str) -> int:
    text = str(force.get(axis, "1"))
    return int(text) if text.isdigit() else 1


def run_check(plan: Plan, *, debug: bool = False) -> CheckResult:
    """plan: made for the float64 workload that check_workload gives."""
    events: list[Event] = []
    with tempfile.TemporaryDirectory(prefix="shardwright-") as folder:
        path = Path(folder) / "plan.json"
        plan.save(path)
        launch({"task": "check", "plan": str(path)}, plan.mesh.num_devices, events.append, debug=debug)
    found = next(event for event in events if event["event"] == "compared")
    pairs = list(zip(found["losses"], found["reference_losses"], strict=True))
    loss_error = max(abs(a - b) / max(abs(b), 1e-300) for a, b in pairs)
    return CheckResult(plan, loss_error if math.isfinite(loss_error) else math.inf, found["gradients"])


def shrink(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The same kind of model, small. A user's own is left as it is, and so is one that is small already."""
    spec = dict(spec)
    if spec.get("kind") == "factory":
        return spec
    workload = reload_workload(spec)
    if sum(parameter.numel() for parameter in workload.model.parameters()) <= SMALL_PARAMS:
        return spec
    config = getattr(workload.model, "config", None)
    if config is None:
        return spec
    settings = diffusion.small_settings(config) if spec.get("kind") == diffusion.KIND else _small_settings(config)
    small = {**spec, "overrides": {**settings, **spec.get("overrides", {})}}
    if spec.get("seq_len"):
        holds_an_image = spec.get("kind") == "image-text-to-text"
        small["seq_len"] = min(spec["seq_len"], SMALL_SEQ_LEN + (SMALL_IMAGE_TOKENS if holds_an_image else 0))
    return small


def _small_settings(config: Any) -> dict[str, Any]:
    """What of SMALL_SETTINGS a transformers configuration, or a part of it, has."""
    text = text_config(config)
    general = {"num_layers", "hidden_size", "num_heads", "intermediate_size"}
    settings = {
        name: value
        for name, value in SMALL_SETTINGS.items()
        if knows(config, name) and (name in general or _is_set(config, name))
    }
    heads, kv_heads = getattr(text, "num_attention_heads", 1), getattr(text, "num_key_value_heads", None)
    if kv_heads is not None:
        settings["num_kv_heads"] = 4 if kv_heads == heads else 2
    if "vocab_size" in settings:
        settings |= _placeholders(config, settings["vocab_size"])
    return settings


def _placeholders(config: Any, vocab_size: int) -> dict[str, int]:
    """Tokens that stand for an image or a sound, moved into a small vocabulary."""
    beyond = [
        name
        for name, value in config.to_dict().items()
        if name.endswith(("_token_id", "_token_index")) and name.startswith(("image", "video", "vision", "audio"))
        if isinstance(value, int) and value >= vocab_size
    ]
    return {name: vocab_size - 1 - index for index, name in enumerate(beyond)}


def _is_set(config: Any, name: str) -> bool:
    """A setting that is None has its value follow from others; it stays so."""
    return any(getattr(part, name, None) is not None for part in (config, *parts_of(config).values()))


def scale_down(plan: Plan, num_processes: int = DEFAULT_PROCESSES) -> dict[str, str]:
    """What to force for a plan of the same kind on fewer processes: each axis that is split stays split if it can."""
    mesh = plan.mesh.shape
    sizes = dict.fromkeys(easiest_first(), 1)
    for axis in reversed(easiest_first()):
        if mesh.size(axis) > 1 and math.prod(sizes.values()) * 2 <= num_processes:
            sizes[axis] = 2
    parts = {axis: sizes[free_axis()] for axis in expert_axes() if mesh.size(axis) > 1 and sizes[free_axis()] > 1}
    sizes |= parts
    force = {axis: str(size) for axis, size in sizes.items()}
    small = MeshShape.of(sizes)
    force["zero"] = str(plan.zero if small.state_ranks > 1 else 0)
    force["schedule"] = plan.schedule.name
    if small.pipeline_ranks == 1:
        force["schedule"] = "1f1b"
    elif plan.schedule.virtual_stages > 1:
        force["virtual_stages"] = "2"
    policy = plan.memory_policy
    choices = {*policy.recompute.values(), *policy.instances.values()}
    partly = any(not isinstance(choice, str) for choice in choices)
    force["recompute"] = "selective" if partly else "all" if "all" in choices else "none"
    return force


def check_plan(
    plan: Plan, *, progress: api.Progress | None = None, debug: bool = False, trust_model: bool = False
) -> CheckResult:
    """The plan's kind of split, on small shapes and the processes at hand. trust_model: import the Python that the plan
    names, though this user did not make the plan here."""
    trust.require(plan, trust_model, "trust_model=True")
    force = scale_down(plan)
    processes = math.prod(int(force[axis]) for axis in easiest_first())
    spec = {**plan.workload, "global_batch": 8}
    return check(spec, f"{processes}xCPU", force=force, progress=progress, debug=debug)
