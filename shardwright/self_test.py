"""The self-test: does the captured graph compute what the model as written computes?

Run where a plan is made, or a program built, of a model with real values, in one process and without a process group:
the graph op by op, the model as it is, both from the same state, with the same random numbers. Compared are the loss,
every gradient, every buffer, and all parameters after an optimizer step; then all of it once more from there, so that
what the graph took for constant shows.

It is done in float64, on a copy of the model. Where that cannot be, or the two differ there, it is done in the model's
own dtype, as a model may take another path in another dtype. What half precision has is too coarse to settle a
difference: it must then vanish in float32 too, in a model and a graph of that dtype. Last the model itself runs
once, in place of its copy, so that what a copy loses shows too; its gradients and buffers are put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from . import reference
from .costmodel.constants import assumed
from .errors import ExitCode, ShardwrightError
from .kernels.ops import make_key
from .passes.formats import arranged
from .plans.document import SelfTest
from .profiler.attributes import Attributes
from .profiler.batches import make_batch
from .profiler.capture import capture
from .profiler.copies import buffers_kept, copy_workload
from .profiler.graph import ModelGraph
from .profiler.models import make_reference_dtype
from .profiler.nodes import users_line_in
from .profiler.run_graph import Ran, run_graph
from .profiler.work import op_costs
from .profiler.workload import Workload
from .rounding import dense, largest, roundings

BUDGET_S = 30.0  # most that a self-test may take, by estimate
# Largest difference of a tensor, relative to its largest entry. Rounding alone stays far below.
TOLERANCES = {torch.float64: 1e-7, torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.02}
# What is smaller than this share of the largest gradient (of one, for other tensors) has no digits to agree on.
FLOORS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.1}
_OWN_KINDS = (None, "factory")  # of Workload.spec: the user's own; others are built from a configuration
_RUNS = 4  # two steps of the graph, two of the model
_LEARNING_RATE, _DECAY = 1e-2, 0.1  # of the step: decay shows which parameters are stepped at all


class _CannotRun(Exception):
    """An op of the graph has no kernel for this device and dtype, or memory does not suffice."""


class _GraphFails(Exception):
    """An op of the graph cannot take what it is given: the graph is not that of a model that runs."""


def is_applicable(workload: Workload) -> bool:
    """A user's own model with real values."""
    tensors = [*workload.model.parameters(), *workload.model.buffers()]
    return workload.spec.get("kind") in _OWN_KINDS and not any(tensor.is_meta for tensor in tensors)


def self_test(workload: Workload, graph: ModelGraph, *, budget_s: float = BUDGET_S) -> SelfTest:
    """What came of it. graph: captured of the workload's model.

    Raises ShardwrightError, exit code 5, where the graph computes something else than the model.
    """
    started = time.perf_counter()
    if not is_applicable(workload):
        return SelfTest(status="not applicable", reason="the model is the library's, or has no values yet")
    device = next(iter(workload.model.parameters()), torch.zeros(())).device
    seconds, num_bytes = _estimate(graph)
    if device.type == "cpu" and seconds > budget_s:
        return SelfTest(status="skipped", reason=f"it would take about {seconds:.0f} s; the budget is {budget_s:.0f} s")
    if num_bytes > 0.5 * free_bytes(device):
        return SelfTest(status="skipped", reason=f"it would take about {num_bytes / 2**30:.1f} GiB of memory")
    size = graph.batch_size
    batch = make_batch(workload, size, device=device, seed=workload.seed + 1)
    small = dataclasses.replace(workload, example_batch=batch, global_batch=size, batch_size=size, spec={})
    found = _in_either_dtype(small, graph, device)
    if isinstance(found, str):
        return SelfTest(status="skipped", reason=found)
    dtype, worst = found
    return SelfTest(
        status="passed",
        dtype=str(dtype).removeprefix("torch."),
        samples=size,
        largest_difference=worst,
        seconds=time.perf_counter() - started,
    )


def _in_either_dtype(workload: Workload, graph: ModelGraph, device: torch.device) -> tuple[torch.dtype, float] | str:
    """(dtype, largest difference), or why nothing could be run."""
    own = _dtype_of(workload)
    if own != torch.float64:
        found = _in_float64(workload, graph, device)
        if found is not None and found.is_equal(torch.float64) and _is_equal_itself(workload, graph, device):
            return torch.float64, found.worst
        if found is not None and own != torch.float32 and not found.is_near(torch.float64):
            _require_equal_in_float32(workload, device)
    try:
        copied = copy_workload(workload)
    except Exception as error:  # whatever a module that holds locks, handles or groups raises when it is copied
        return f"the model cannot be copied: {type(error).__name__}: {error}"
    try:
        found = _Comparison(copied, graph, device, widen=False).run()
    except _CannotRun as error:
        return f"the graph cannot be run op by op here: {error}"
    except _GraphFails as error:
        raise _fails_as_graph(workload, error) from error
    except ShardwrightError:
        raise
    except Exception as error:  # of the user's own code: it may raise anything
        if _is_lacking(error):
            return f"this machine cannot run it: {first_line(error, 160)}"
        raise _fails_itself(workload, error) from error
    for differences in (found, _itself(workload, graph, device)):
        if not differences.is_near(own):
            raise differences.error(workload, own)
        if differences.unknown:
            return f"the model as written gives NaN, as the graph does: {', '.join(differences.unknown[:4])}"
    return own, found.worst


def _in_float64(workload: Workload, graph: ModelGraph, device: torch.device) -> _Differences | None:
    """None where an op, or the model's own code, is there in the model's dtype only, or no copy can be made."""
    try:
        return _Comparison(make_reference_dtype(workload), graph, device, widen=True).run()
    except Exception:  # it is done once more, in the model's own dtype, where nothing is passed over
        return None


def _is_equal_itself(workload: Workload, graph: ModelGraph, device: torch.device) -> bool:
    try:
        return _itself(workload, graph, device).is_equal(_dtype_of(workload))
    except Exception:  # the copy then says why
        return False


def _require_equal_in_float32(workload: Workload, device: torch.device) -> None:
    """Where the model runs in float32; its graph is captured anew, as constants such as an epsilon go by the dtype."""
    try:
        narrow = make_reference_dtype(workload, torch.float32)
        found = _Comparison(narrow, capture(narrow), device, widen=False).run()
    except Exception:  # its own code runs in half precision only, or is refused in float32
        return
    if not found.is_near(torch.float32):
        raise found.error(workload, torch.float32)


def _itself(workload: Workload, graph: ModelGraph, device: torch.device) -> _Differences:
    """The loss and the gradients of the model, not of a copy, against those of the graph."""
    model = workload.model
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        with buffers_kept(model), Attributes(model).put_back():  # what a forward caches would be another graph's
            return _Comparison(workload, graph, device, widen=False).run_once()
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient


def _dtype_of(workload: Workload) -> torch.dtype:
    return next((p.dtype for p in workload.model.parameters() if p.dtype.is_floating_point), torch.float32)


def first_line(error: Exception, length: int | None = None) -> str:
    return (str(error).strip().splitlines() or [""])[0][:length]


def _is_lacking(error: Exception) -> bool:
    """A kernel, or memory: of the machine, not of the model."""
    text = first_line(error, 160)
    named = any(words in text for words in ("not implemented", "not supported", "t allocate memory"))
    lacks = isinstance(error, (NotImplementedError, torch.OutOfMemoryError))
    return isinstance(error, RuntimeError) and (named or lacks)


def _fails_as_graph(workload: Workload, error: Exception) -> ShardwrightError:
    return ShardwrightError(
        f"the graph captured of {workload.name} cannot be run: {error}",
        means="the self-test runs it op by op beside the model as written; what is planned would fail likewise",
        change="what of the model a trace of its forward does not see; or --no-self-test (self_test=False)",
        works="a model without it: docs/capture.md says what is captured",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def _fails_itself(workload: Workload, error: Exception) -> ShardwrightError:
    return ShardwrightError(
        f"{workload.name} fails in plain PyTorch: {type(error).__name__}: {first_line(error, 200)}",
        means=_where_it_fails(workload, error)
        or "the self-test runs forward, backward and a step of the model as written beside the captured graph",
        change="the model",
        works="one for which loss.backward() runs; or --no-self-test (self_test=False)",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def _where_it_fails(workload: Workload, error: Exception) -> str:
    """The line whose gradient autograd finds overwritten; only its anomaly mode knows it."""
    if "modified by an inplace operation" not in str(error):
        return ""
    copied = copy_workload(workload)
    text = io.StringIO()
    with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stderr(text):
        warnings.simplefilter("always")
        with torch.autograd.set_detect_anomaly(True), contextlib.suppress(Exception):  # it fails once more
            reference.forward_backward(copied, copied.example_batch, microbatch_size=copied.batch_size)
    told = "\n".join([*(str(one.message) for one in caught), text.getvalue()])
    line = users_line_in(told)
    return f"what {line} computes is written over before its gradient is taken" if line else ""


@dataclass(frozen=True)
class _Differences:
    """Of every tensor compared: relative to its largest entry; infinite where one side lacks it."""

    by_name: Mapping[str, float]
    sets: tuple[str, ...] = ()  # attributes that the forward sets
    unknown: tuple[str, ...] = ()  # NaN on both sides, of which nothing can be told

    @property
    def worst(self) -> float:
        return max(self.by_name.values(), default=0.0)

    def is_equal(self, dtype: torch.dtype) -> bool:
        return self.is_near(dtype) and not self.unknown

    def is_near(self, dtype: torch.dtype) -> bool:
        """As far as can be told."""
        return self.worst <= TOLERANCES.get(dtype, 1e-3)

    def error(self, workload: Workload, dtype: torch.dtype) -> ShardwrightError:
        wrong = {n: e for n, e in self.by_name.items() if not e <= TOLERANCES.get(dtype, 1e-3)}
        first = sorted(wrong, key=lambda name: (-wrong[name], name))[:4]
        shown = ", ".join(f"{name} by {wrong[name]:.1e}" if math.isfinite(wrong[name]) else name for name in first)
        more = f" and {len(wrong) - len(first)} more" if len(wrong) > len(first) else ""
        lacking = " (without a number: one side has none)" if any(math.isinf(wrong[n]) for n in first) else ""
        return ShardwrightError(
            f"the graph captured of {workload.name} differs from the model as written: {shown}{more}{lacking}",
            means=f"relative to the largest entry, in {str(dtype).removeprefix('torch.')}; training would be another's",
            change=self._suspects() + "; or --no-self-test (self_test=False)",
            works="a model without it: docs/capture.md says what is captured",
            exit_code=ExitCode.UNSUPPORTED_MODEL,
        )

    def _suspects(self) -> str:
        if not self.sets:
            return "what of the model a trace of its forward does not see"
        names = ", ".join(self.sets[:4]) + (f" and {len(self.sets) - 4} more" if len(self.sets) > 4 else "")
        return f"{names}: the forward sets that, and a graph does not carry it to the next step (register_buffer does)"


class _Comparison:
    """Two steps of the graph and of the model, side by side. workload: its model is a copy that may be stepped."""

    def __init__(self, workload: Workload, graph: ModelGraph, device: torch.device, *, widen: bool) -> None:
        self.workload, self.graph, self.device, self.widen = workload, graph, device, widen
        model = workload.model
        self.floor = FLOORS.get(torch.float64 if widen else _dtype_of(workload), 1e-3)
        self.parameters = {
            name: torch.nn.Parameter(p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()
        }
        self.buffers = {name: b.detach().clone() for name, b in model.named_buffers(remove_duplicate=False)}
        self.found: dict[str, float] = {}
        self.unknown: dict[str, None] = {}

    def run(self) -> _Differences:
        mine = torch.optim.SGD(self._trained(self.parameters.values()), lr=_LEARNING_RATE, weight_decay=_DECAY)
        theirs = torch.optim.SGD(
            self._trained(self.workload.model.parameters()), lr=_LEARNING_RATE, weight_decay=_DECAY
        )
        for step in range(2):
            ran = self._run_graph(step)
            self._compare(ran, self._as_written(step), step)
            _make_dense(self.workload.model)  # as weight decay takes no other gradients
            for name, parameter in self.parameters.items():
                gradient = ran.gradients.get(name)
                parameter.grad = None if gradient is None else gradient.to(parameter.dtype)
            for name, new in ran.buffers.items():
                self.buffers[name].copy_(new)
            mine.step()
            theirs.step()
            self._compare_state()
        return _Differences(self.found, self.graph.attributes_set, tuple(self.unknown))

    def run_once(self) -> _Differences:
        self._compare(self._run_graph(0), self._as_written(0), 0)
        return _Differences(self.found, self.graph.attributes_set, tuple(self.unknown))

    def _trained(self, parameters: object) -> list[torch.nn.Parameter]:
        return [p for p in parameters if p.requires_grad]  # type: ignore[attr-defined]

    def _run_graph(self, step: int) -> Ran:
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64 if self.widen else before)
        try:
            return run_graph(
                self.graph,
                {**self.parameters, **self.buffers},
                self.workload.example_batch,
                key_of=lambda base: make_key(self.workload.seed, step, 0, base),
                widen=self.widen,
                device=self.device,
                arranged=arranged,
            )
        except ShardwrightError:
            raise
        except Exception as error:  # ops of the user's own may raise anything
            kind = _CannotRun if _is_lacking(error) else _GraphFails
            raise kind(f"{type(error).__name__}: {first_line(error, 160)}") from error
        finally:
            torch.set_default_dtype(before)

    def _as_written(self, step: int, workload: Workload | None = None) -> torch.Tensor:
        """workload: a copy of this one."""
        of = workload or self.workload
        return reference.forward_backward(of, of.example_batch, microbatch_size=of.batch_size, step=step)

    def _compare(self, ran: Ran, loss: torch.Tensor, step: int) -> None:
        self._keep("loss", self._difference("loss", ran.loss.double().cpu(), loss.double()))
        expected = {n: dense(p.grad) for n, p in self.workload.model.named_parameters() if p.grad is not None}
        floor = self.floor * max((largest(g) for g in expected.values()), default=0.0)
        errors = {}
        for name in {*expected, *ran.gradients}:
            label = f"gradient of {name}"
            errors[name] = self._difference(label, ran.gradients.get(name), expected.get(name), floor)
        for name in self._rounding_alone(errors, ran, expected, step):
            errors[name] = 0.0
            ran.gradients[name] = expected[name]  # lest the next step starts from another rounding
        for name, error in errors.items():
            self._keep(f"gradient of {name}", error)

    def _rounding_alone(
        self, errors: Mapping[str, float], ran: Ran, expected: Mapping[str, torch.Tensor], step: int
    ) -> list[str]:
        """Gradients that are rounding alone (sums that cancel) and differ by no more than that."""
        tolerance = TOLERANCES.get(_dtype_of(self.workload), 1e-3)
        wrong = [name for name, error in errors.items() if math.inf > error > tolerance]
        may_differ = roundings(self.workload, lambda copied: self._as_written(step, copied)) if wrong else {}
        return [
            name
            for name in wrong
            if name in may_differ
            and largest(dense(ran.gradients[name]).to(expected[name].dtype) - expected[name]) <= may_differ[name]
        ]

    def _compare_state(self) -> None:
        for name, buffer in self.workload.model.named_buffers(remove_duplicate=False):
            self._keep(f"buffer {name}", self._difference(f"buffer {name}", self.buffers[name], buffer))
        for name, parameter in self.workload.model.named_parameters():
            mine, theirs, label = self.parameters[name].detach(), parameter.detach(), f"{name} after a step"
            self._keep(label, self._difference(label, mine, theirs))

    def _difference(
        self, label: str, mine: torch.Tensor | None, theirs: torch.Tensor | None, floor: float | None = None
    ) -> float:
        """Relative; infinite where one side has none."""
        if mine is None or theirs is None:
            return math.inf
        mine, theirs = dense(mine), dense(theirs)
        if torch.equal(mine, theirs):
            return 0.0
        error = relative_difference(mine, theirs, self.floor if floor is None else floor)
        if math.isnan(error):
            self.unknown[label] = None
            return 0.0
        return error

    def _keep(self, label: str, error: float) -> None:
        """The largest of all steps."""
        self.found[label] = max(self.found.get(label, 0.0), error)


def _make_dense(model: torch.nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = dense(parameter.grad)


def relative_difference(mine: torch.Tensor, theirs: torch.Tensor, floor: float) -> float:
    """NaN where both have one."""
    if mine.shape != theirs.shape or theirs.dtype == torch.bool:
        return math.inf
    error = largest(mine.to(theirs.dtype) - theirs) / max(largest(theirs), floor, 1e-300)
    if math.isnan(error) and not (bool(theirs.isnan().any()) and bool(mine.isnan().any())):
        return math.inf
    return error


def _estimate(graph: ModelGraph) -> tuple[float, int]:
    """(seconds on one core, bytes) of all runs."""
    flops, ops, kept = 0.0, 0, 0
    costs = {name: op_costs(segment) for name, segment in graph.segments.items()}
    for instance in graph.instances:
        ops += len(costs[instance.segment])
        flops += sum(cost.flops for cost in costs[instance.segment])
        kept += sum(cost.output_bytes for cost in costs[instance.segment])
    seconds = flops / assumed("self_test_flops_per_s") + ops * assumed("self_test_op_s")
    return _RUNS * seconds, 2 * kept + 8 * 4 * graph.num_params


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
