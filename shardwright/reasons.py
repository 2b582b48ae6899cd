"""explain and why_not: a plan taken apart, and beside it the plan with another choice forced."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from . import api, hashes, trust
from .costmodel.model import CostModel
from .costmodel.stacks import stack_named
from .errors import ExitCode, ShardwrightError
from .jobs import job_of
from .planner.report.diff import Difference, compare
from .planner.report.explain import Explanation
from .planner.report.explain import explain as explain_graph
from .planner.sharding.sharder import Sharder
from .plans.document import Plan
from .profiler.cluster import Cluster
from .profiler.discovery import discover_local
from .profiler.hardware import parse_hardware


@dataclass(frozen=True)
class WhyNot:
    """What came of forcing a choice. forced: the whole of what was forced. plan and difference: None where it cannot
    be done, and then `refusal` says why."""

    forced: dict[str, str]
    plan: Plan | None
    difference: Difference | None
    refusal: ShardwrightError | None


def explain(plan: Plan, *, hardware: Cluster | str | None = None, trust_model: bool = False) -> Explanation:
    """What the plan decided for each op, its cost, module and source line. Captures the model again.

    hardware: the cluster, where its name is not enough to know it (a TOML file's, another machine's "local").
    trust_model: import the Python that the plan names, though this user did not make the plan here.
    Raises ShardwrightError, exit code 7, where the model or the hardware is not what the plan was made for.
    """
    cluster = cluster_of(plan, hardware)
    hashes.verify_version(plan)
    workload = trust.workload_of(plan, trust_model)
    graph = api.capture_of(plan, workload)
    hashes.verify_model(plan, graph)
    job = job_of(workload, workload.global_batch, plan.forced)
    return explain_graph(plan, graph, Sharder(graph, CostModel(cluster, stack=stack_named(plan.stack)), job=job))


def why_not(
    plan: Plan,
    choices: Mapping[str, str],
    *,
    hardware: Cluster | str | None = None,
    time_limit_s: float | None = None,
    progress: api.Progress | None = None,
    trust_model: bool = False,
) -> WhyNot:
    """Plan again with these choices forced, besides those that were (`shardwright plan --force` says which there are).

    Raises ShardwrightError for choices that mean nothing; one that cannot be met, or needs more memory than there is,
    is an answer.
    """
    forced = {**plan.forced, **{key: str(value) for key, value in choices.items()}}
    for one, other_name in (("microbatch", "global_microbatch"), ("global_microbatch", "microbatch")):
        if one in choices and other_name not in choices:  # they say the same
            forced.pop(other_name, None)
    try:
        other = api.plan(
            trust.workload_of(plan, trust_model),
            cluster_of(plan, hardware),
            force=forced,
            time_limit_s=time_limit_s,
            stack=plan.stack,
            progress=progress,
        )
    except ShardwrightError as error:
        if error.exit_code not in (ExitCode.DOES_NOT_FIT, ExitCode.CONTRADICTION):
            raise
        return WhyNot(forced, None, None, error)
    return WhyNot(forced, other, compare(plan, other), None)


def cluster_of(plan: Plan, hardware: Cluster | str | None = None) -> Cluster:
    """The cluster that a plan was made for, its memory limit included."""
    limit = plan.hardware.get("memory_limit_bytes")
    name = str(plan.hardware.get("name", ""))
    try:
        if isinstance(hardware, Cluster):
            cluster = hardware
        elif (hardware or name) == "local":  # a script's own devices, or a whole machine's
            cluster = discover_local(plan.mesh.num_devices)
        else:
            cluster = parse_hardware(hardware or name)
    except ShardwrightError:
        if hardware is not None:
            raise
        raise _unknown_hardware(name, "it names no hardware that is known here") from None
    if limit is not None and cluster.memory_limit_bytes is None:
        cluster = cluster.with_memory_limit(int(limit))
    if cluster.hash != plan.hashes.hardware:
        raise _unknown_hardware(name, f"{cluster.name} is other hardware (digest {cluster.hash})")
    return cluster


def _unknown_hardware(name: str, reason: str) -> ShardwrightError:
    return ShardwrightError(
        f"the plan was made for {name!r}: {reason}",
        means="its costs cannot be worked out again",
        change="--hardware",
        works="the name or the TOML file that the plan was made with",
        exit_code=ExitCode.PLAN_MISMATCH,
    )
