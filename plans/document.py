"""The Plan: one JSON document that says everything the runtime needs and everything the planner claims.

Versioned; loads without pickle; keys are in a fixed order so that two plans can be diffed as text.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from ..errors import ExitCode, ShardwrightError
from ..profiler.files import replace_text
from .axes import MeshShape
from .axes import names as axis_names
from .document_checks import problem_of, seal

SCHEMA_VERSION = "shardwright.plan/2"
READABLE_VERSIONS = ("shardwright.plan/1", SCHEMA_VERSION)  # 1: a segment is recomputed whole or not at all


class _Document(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Hashes(_Document):
    """document: the seal, a digest of all the rest, written with the file; a plan that was edited is refused by it."""

    model: str
    shapes: str
    hardware: str
    version: str
    document: str = ""


class Mesh(_Document):
    """Sizes of axes. The experts' axis divides the ranks that carry the batch and is no factor of the devices.

    Axes that are registered (plans/axes.py) beside those of the schema stand after them."""

    model_config = ConfigDict(extra="allow", json_schema_extra={"additionalProperties": False})
    __pydantic_extra__: dict[str, int]

    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    tp: int = 1

    @model_validator(mode="after")
    def _has_known_axes(self) -> Mesh:
        if unknown := set(self.model_extra or {}) - set(axis_names()):
            raise ValueError(f"{', '.join(sorted(unknown))}: there is no such axis")
        return self

    @classmethod
    def of(cls, shape: MeshShape) -> Mesh:
        fields = cls.model_fields
        sizes = {axis: size for axis, size in shape.named.items() if axis in fields or size > 1}
        return cls.model_validate(sizes)

    @property
    def shape(self) -> MeshShape:
        return MeshShape.of(self.model_dump())

    @property
    def num_devices(self) -> int:
        return self.shape.num_devices


class Microbatch(_Document):
    """size: sequences in one global microbatch (all data-parallel ranks together); count: microbatches in a step."""

    size: int
    count: int


class Schedule(_Document):
    """name: one of schedules/published, or "synthesized": then order has each pipeline rank's actions with spaces
    between, as "0F0 0F1 0B0" (stage, kind, microbatch), and stage_rank the pipeline rank of each virtual stage.

    What an R stands for is not kept from its F to there; what stands between O and L is in host memory."""

    name: str
    virtual_stages: int = 1  # stages on each pipeline rank
    order: list[str] = Field(default_factory=list)
    stage_rank: list[int] = Field(default_factory=list)


class Stage(_Document):
    """segments: indices of the segment instances it runs, in order. ranks: the global ranks that run it; of a schedule
    of two directions, those of the first come first."""

    segments: list[int]
    ranks: list[int]


# "none", "all" (the forward runs again in the backward), or the ops whose results are not kept but made again there;
# NODE.K>kept for a result that is kept as its producer has it and brought into the form that the backward reads there
RecomputeChoice = Literal["none", "all"] | tuple[str, ...]


def choice_text(choice: RecomputeChoice) -> str:
    """'none', 'all', or of how many ops."""
    return choice if isinstance(choice, str) else f"{len(choice)} ops"


class MemoryPolicy(_Document):
    """recompute: of each distinct segment. instances: of those segment instances that do otherwise than their segment,
    by index. optimizer_state: where it is, with the parameters' copies that the optimizer steps over, and where they
    are stepped."""

    recompute: dict[str, RecomputeChoice] = Field(default_factory=dict)
    instances: dict[int, RecomputeChoice] = Field(default_factory=dict)
    optimizer_state: Literal["device", "host"] = "device"

    def choice(self, segment: str, instance: int | None = None) -> RecomputeChoice:
        """Of an instance of the segment; of those that do as their segment where none is named."""
        if instance in self.instances:
            return self.instances[instance]
        return self.recompute.get(segment, "none")

    def choices(self, segments: Sequence[str]) -> dict[str, Counter[RecomputeChoice]]:
        """Of each distinct segment, how many of its instances make each choice. segments: of each instance."""
        found: dict[str, Counter[RecomputeChoice]] = {}
        for index, name in enumerate(segments):
            found.setdefault(name, Counter())[self.choice(name, index)] += 1
        return found

    def recomputed(self, segments: Sequence[str]) -> dict[str, str]:
        """Of each distinct segment of which something runs again: "all", or how many ops, in how many of its instances
        where that is not in all."""
        texts = {}
        for name, counted in self.choices(segments).items():
            parts = [
                choice_text(choice) + (f" in {count} of {sum(counted.values())}" if len(counted) > 1 else "")
                for choice, count in sorted(counted.items(), key=lambda one: len(one[0]))
                if choice != "none"
            ]
            if parts:
                texts[name] = ", ".join(parts)
        return texts

    def among(self, placements: Mapping[str, Collection[str]], segments: Sequence[str]) -> MemoryPolicy:
        """Of the ops and forms to make again, those that these placements have."""

        def kept(choice: RecomputeChoice, name: str) -> RecomputeChoice:
            rows = placements.get(name, ())
            return choice if isinstance(choice, str) else tuple(op for op in choice if op in rows)

        chosen = {name: kept(choice, name) for name, choice in self.recompute.items()}
        apart = {index: kept(choice, segments[index]) for index, choice in self.instances.items()}
        return self.model_copy(update={"recompute": chosen, "instances": apart})


class StageSeconds(_Document):
    """One virtual stage, for one microbatch; reduce_s: of its gradients, once a step. send_s, send_back_s: what its
    value takes to the next stage, and the value's gradient back, in which the link is busy; *_latency_s: until it has
    arrived after that. offload_s: of its activations to host memory, and
    back; 0 where that was not offered. activation_bytes: kept from its forward to its backward; of them recompute_bytes
    where an action of the order makes them again, and offload_bytes where one moves them."""

    forward_s: float
    backward_input_s: float
    backward_weight_s: float
    reduce_s: float = 0.0
    send_s: float = 0.0
    send_back_s: float = 0.0
    send_latency_s: float = 0.0
    send_back_latency_s: float = 0.0
    offload_s: float = 0.0
    activation_bytes: int = 0
    recompute_bytes: int = 0
    offload_bytes: int = 0


class RankMemory(_Document):
    """Bytes of the worst rank of a pipeline rank by kind (costmodel/memory.py). lasting: all through the step;
    pipeline: beside the activations, where a backward runs; step: in the optimizer step in place of both."""

    lasting: dict[str, int]
    pipeline: dict[str, int]
    step: dict[str, int]
    slack_fraction: float
    reserve_bytes: int


class Predicted(_Document):
    step_s: float
    # between which eight of ten published runs of the stack were that are predicted so; empty where nothing is known
    step_range_s: list[float] = Field(default_factory=list)
    tokens_per_s_per_device: float
    mfu: float
    peak_bytes: list[int]  # the worst rank of each stage
    bubble_fraction: float
    exposed_comm_s: float
    memory: dict[str, int] = Field(
        default_factory=dict
    )  # worst rank: parameters, gradients, optimizer, activations, ...
    memory_limit_bytes: int = 0
    memory_margin_bytes: int = 0  # of that, what the plan's peak leaves free on purpose
    # of memory_sure of runs, memory was at most memory_error more than predicted, as a share of the peak
    memory_error: float = 0.0
    memory_sure: float = 0.0
    host_bytes: int = 0  # of host memory, on the rank that needs most: optimizer state and what it is stepped by
    host_limit_bytes: int = 0  # of that rank's share; 0: not known
    stage_s: list[StageSeconds] = Field(default_factory=list)
    rank_memory: list[RankMemory] = Field(default_factory=list)  # of each pipeline rank
    tail_s: list[float] = Field(default_factory=list)  # of each pipeline rank: optimizer step and gathers after it
    tails_wait: bool = False  # an optimizer step begins once all ranks have their gradients, as it needs their norm
    # mesh axis -> the shares of "parameters", and of the bytes of "activations" kept for the backward, that it splits
    split: dict[str, dict[str, float]] = Field(default_factory=dict)


class ShardingProof(_Document):
    """What the sharding solver proved on the plan's own mesh. objective_s: of all segments, a microbatch, one rank."""

    status: str
    objective_s: float
    lower_bound_s: float
    gap_fraction: float
    seconds: float


class Certificate(_Document):
    """status: optimal (gap proven within tolerance) | feasible. lower_bound_s: of any plan in the searched space.
    not_searched: what the bound says nothing about."""

    status: str
    lower_bound_s: float
    gap_fraction: float
    not_searched: list[str] = Field(default_factory=list)
    sharding: ShardingProof | None = None


class PlanningTime(_Document):
    capture: float
    solve: float
    total: float


class SelfTest(_Document):
    """The captured graph beside the model as written: loss, gradients, buffers and an optimizer step, twice.

    largest_difference: of any of these tensors, relative to its largest entry. reason: why it was not run.
    """

    status: Literal["passed", "skipped", "off", "not applicable"]
    reason: str = ""
    dtype: str = ""
    samples: int = 0
    largest_difference: float | None = None
    seconds: float = 0.0


class Considered(_Document):
    """microbatch: sequences of one, all data-parallel ranks together."""

    mesh: Mesh
    microbatch: int
    schedule: str
    zero: int
    zero_extents: dict[str, int] = Field(default_factory=dict)  # as in Plan
    optimizer_state: Literal["device", "host"] = "device"
    recompute: str
    step_s: float | None
    peak_bytes: int | None
    reason: str  # why it lost: 'slower by 3.1 %', 'needs 91.2 GiB of 80.0 GiB', 'bound 1.9 s is above the incumbent'


class ConservativeOp(_Document):
    op: str
    node: str
    source: str
    cost_s: float


class Plan(_Document):
    schema_: str = Field(default=SCHEMA_VERSION, alias="schema")
    hashes: Hashes
    workload: dict[
        str, Any
    ]  # enough for the command line to rebuild the Workload: model spec, batch, seq_len, dtype, ...
    hardware: dict[str, Any]  # name, devices, sources of the figures
    stack: str = "shardwright"  # software whose habits the predictions have; see costmodel/stacks.py
    mesh: Mesh
    microbatch: Microbatch
    # of the batch: "mean" or "sum" of its samples, which a step gives exactly over microbatches, or neither: "each"
    # microbatch's is averaged, as under gradient accumulation
    loss_over: Literal["mean", "sum", "each"] = "mean"
    schedule: Schedule
    stages: list[Stage]
    segments: list[str] = Field(default_factory=list)  # distinct segment of each instance, in execution order
    # distinct segment -> joint-graph node -> one placement per axis of placement_axes: "R", "S(1)", "P"
    placement_axes: list[str]
    placements: dict[str, dict[str, list[str]]]
    zero: int
    # data-parallel ranks, next to each other, that share one copy of "parameters", "gradients" and "optimizer" state;
    # empty: what the ZeRO stage splits is split over all of them
    zero_extents: dict[str, int] = Field(default_factory=dict)
    # of the ranks of the experts' axis, next to each other, that share a host: a token crosses to each host once, and
    # goes on to its ranks from there; 1: it goes to each rank by itself
    expert_ranks_per_host: int = Field(default=1, ge=1)
    # in how many parts, one after the other, a rank's tokens go to experts, so that messages pass beside products
    expert_chunks: int = Field(default=1, ge=1)
    memory_policy: MemoryPolicy
    fusions: list[str] = Field(default_factory=list)  # fused kernels that the cost model says win
    forced: dict[str, str] = Field(default_factory=dict)
    predicted: Predicted
    certificate: Certificate
    planning_s: PlanningTime
    considered: list[Considered] = Field(default_factory=list)
    conservative_ops: list[ConservativeOp] = Field(default_factory=list)
    self_test: SelfTest | None = None

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    def to_json(self) -> str:
        document = self.model_dump(by_alias=True, mode="json")
        document["hashes"]["document"] = self.seal
        return json.dumps(document, indent=1)

    @property
    def seal(self) -> str:
        """What stands in hashes.document of the plan's file."""
        return seal(self.model_dump(by_alias=True, mode="json"))

    def save(self, path: str | Path) -> None:
        """Whole or not at all: an old plan is never lost."""
        try:
            replace_text(Path(path), self.to_json() + "\n")
        except (OSError, ValueError, RuntimeError) as error:  # a zero byte in the name; a ring of links
            raise ShardwrightError(
                f"cannot write {path}: {getattr(error, 'strerror', None) or error}",
                means="the plan was made but could not be saved; nothing was overwritten",
                change="-o PATH",
                works=f"-o {Path(tempfile.gettempdir()) / 'plan.json'}",
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Raises ShardwrightError, exit code 7, for a file that is no plan, or not the whole of one as it was made."""
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ShardwrightError(
                f"cannot read plan {path}: {error}", change="the plan's path", works="plan.json"
            ) from None
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise _refused(f"{path} is not JSON: {error}", "it is not a plan") from None
        found = document.get("schema") if isinstance(document, dict) else None
        if found not in READABLE_VERSIONS:
            raise _refused(
                f"{path} has schema {found!r}; this version reads {' and '.join(READABLE_VERSIONS)}",
                "it was made by another version, or is not a plan",
            )
        try:
            plan = cls.model_validate(document)
        except ValidationError as error:
            first = error.errors()[0]
            raise _refused(
                f"{path}: field {'.'.join(map(str, first['loc']))}: {first['msg']} ({error.error_count()} problems)"
            ) from None
        if problem := problem_of(plan.model_dump(by_alias=True, mode="json")):
            raise _refused(f"{path}: field {problem}")
        if document["hashes"].get("document") != seal(document):
            raise _refused(f"{path} is not as it was made: its digest is not that of its contents")
        return plan


def _refused(what: str, means: str = "the document was edited, cut short or damaged") -> ShardwrightError:
    return ShardwrightError(
        what,
        means=means,
        change="make the plan again; what you want in it can be forced",
        works="shardwright plan MODEL --hardware NAME --force pp=2 -o plan.json",
        exit_code=ExitCode.PLAN_MISMATCH,
    )


def plan_json_schema() -> dict[str, Any]:
    """The JSON schema of the document, as published in plans/plan.schema.json."""
    return Plan.model_json_schema(by_alias=True)
