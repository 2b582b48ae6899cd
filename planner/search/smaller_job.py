"""Nothing fits: what the job could let go of on the hardware at hand, each value tried before it is named.

Shorter sequences and state in the compute dtype, then an optimizer without state. A shorter sequence is tried with the
activations of the placements found, in proportion to its tokens: attention's own are shorter still.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from ...costmodel.segment import Workspace
from ...plans.axes import MeshShape
from ..interfaces import ShardingSolution
from ..space.candidates import Candidate
from ..space.choices import Choices
from ..stages.setting import Setting

SHORTER = (2, 4, 8, 16, 32)
LEAST_TOKENS = 128
ACTIVATIONS = ("saved_bytes", "input_bytes", "output_bytes", "workspace_bytes")
Known = Mapping[tuple[MeshShape, int], ShardingSolution]  # axes that cut parameters, local batch
FirstFit = Callable[[Setting, Choices, Known], Candidate | None]


@dataclass(frozen=True)
class _Job:
    """options: of the command line, besides --seq-len."""

    setting: Setting
    options: tuple[str, ...]

    def with_tokens(self, tokens: int) -> str:
        return " ".join([f"--seq-len {tokens}", *self.options])

    @property
    def text(self) -> str:
        return " ".join(self.options)


def smaller_jobs(setting: Setting, forced: Choices, known: Known, first_fit: FirstFit) -> list[str]:
    """Options of the command line under which a plan was found on this hardware, mildest first, at most one of each
    kind: a shorter sequence, leaner state, and both with no optimizer state if it takes that."""
    found: list[str] = []
    for job in _jobs(setting):
        if job.options and first_fit(job.setting, forced, known) is not None:
            return [*found, job.text]
        tokens = _fitting_tokens(job, forced, known, first_fit)
        if tokens is not None:
            found.append(job.with_tokens(tokens))
            if job.options:
                return found
    return found


def _jobs(setting: Setting) -> Iterator[_Job]:
    """This one, then with leaner state."""
    yield _Job(setting, ())
    workload = setting.workload
    dtype = workload.precision.compute
    name = {"bfloat16": "bf16", "float16": "fp16"}.get(str(dtype).removeprefix("torch."))
    options: tuple[str, ...] = ()
    if name is not None and workload.precision.master != dtype:
        precision = replace(workload.precision, master=dtype, grad_reduce=dtype)
        workload, options = replace(workload, precision=precision), (f"--state-dtype {name}",)
        yield _Job(replace(setting, workload=workload), options)
    if workload.optimizer.state_tensors:
        optimizer = replace(workload.optimizer, state_tensors=0)
        yield _Job(replace(setting, workload=replace(workload, optimizer=optimizer)), (*options, "--optimizer SGD"))


def _fitting_tokens(job: _Job, forced: Choices, known: Known, first_fit: FirstFit) -> int | None:
    whole = job.setting.workload.spec.get("seq_len")
    if not isinstance(whole, int):
        return None
    for parts in SHORTER:
        tokens = whole // parts
        if whole % parts or tokens < LEAST_TOKENS:
            return None
        if first_fit(job.setting, forced, {key: _shorter(solution, parts) for key, solution in known.items()}):
            return tokens
    return None


def _shorter(solution: ShardingSolution, parts: int) -> ShardingSolution:
    costs = {}
    for name, cost in solution.costs.items():
        points = tuple(
            replace(point, saved_bytes=-(-point.saved_bytes // parts), workspace=_divided(point.workspace, parts))
            for point in cost.recompute_points
        )
        shorter = {kind: -(-getattr(cost, kind) // parts) for kind in ACTIVATIONS}
        held = _divided(cost.workspace, parts)
        costs[name] = replace(cost, recompute_points=points, workspace=held, **shorter)
    boundaries = {name: -(-size // parts) for name, size in solution.boundary_bytes.items()}
    return replace(solution, costs=costs, boundary_bytes=boundaries)


def _divided(workspace: Workspace | None, parts: int) -> Workspace | None:
    return None if workspace is None else workspace.divided(parts)
