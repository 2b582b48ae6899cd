"""Program: this rank's part of a planned training job."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from ..costmodel.trace import COLLECTIVE, COMPUTE, Trace
from ..errors import ShardwrightError
from ..passes.program import SegmentProgram
from ..plans.document import Plan
from ..profiler.graph import ModelGraph
from ..profiler.initial_values import initial_tensors
from ..profiler.workload import Workload
from ..schedules import PipelineSchedule
from . import checkpoint
from .batch import BatchPart, MicrobatchPart
from .buffers import Buffers, SecondDirection, buffer_names, written_buffers
from .by_hand import ByHand
from .collectives import Summing
from .conditions import Conditions
from .coupling import refuse_coupled
from .evaluation import Evaluator, MakeEvaluation
from .extents import DataCut
from .gradients_by_hand import GradientsByHand
from .half_loaded import HalfLoaded
from .host_link import HostLink
from .loss_scaling import loss_scaler
from .memory import MemoryMeter
from .mesh import RankGrid
from .microbatches import Keys, Microbatches, Rebuild
from .offload import HostMemory
from .optimizer import build_optimizer
from .orders import forward_order, schedule_for
from .parameters import ParameterStore, Storage, tied_subsets
from .pipeline import PipelineEngine, Work
from .safetensors import open_safetensors, verify_sums
from .specs import ParamSpec, mirrors, param_specs, summed_axes
from .stage import StageRunner, Variant
from .stepping import Stepper
from .together import num_ranks, on_every_rank
from .totals import BatchTotals, counting_stage
from .trace import Recorder
from .transfers import communicating_lists
from .wiring import Wiring, wire


@dataclass(frozen=True)
class Compiled:
    """The model as the passes left it for this rank, and how to make it again.

    programs: of each distinct segment, and of instances that recompute otherwise. rebuild: makes them for another
    microbatch shape (a short last batch, a new sequence length). evaluation: makes what evaluate() and outputs() run,
    when they are first called; None: the graph that trains.
    """

    graph: ModelGraph
    programs: Mapping[str, SegmentProgram]
    rebuild: Rebuild | None = None
    evaluation: MakeEvaluation | None = None


class Program:
    """One rank's stages, parameters and schedule.

    values: (name, whole tensor) pairs to start from; None: those of workload.model, drawn block by block where it lies
    on meta. adopt: use the tensors of a model that already lies on this device as storage, instead of copies.
    """

    def __init__(
        self,
        plan: Plan,
        compiled: Compiled,
        workload: Workload,
        *,
        device: torch.device | str = "cpu",
        mesh: DeviceMesh | None = None,
        values: Iterable[tuple[str, torch.Tensor]] | None = None,
        adopt: bool = False,
    ) -> None:
        self.plan, self.graph, self.workload = plan, compiled.graph, workload
        self.device = torch.device(device)
        self.grid = RankGrid.of(mesh)
        self.step_index = 0
        self.half_loaded = HalfLoaded()
        self._make_evaluation = compiled.evaluation
        self._evaluator: Evaluator | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._has_optimizer = False
        # each step builds on those before it
        self._wire_stages(compiled.programs)
        specs = self._specs(compiled.programs)
        self._join_groups(specs)
        self._make_store(specs, adopt)
        self._make_buffers()
        self.load_values(values)
        self._make_runners()
        form = workload.call.form
        self.microbatches = Microbatches(
            self.graph, compiled.programs, plan.microbatch.size, self.grid, self.device, compiled.rebuild, form
        )

    # the steps of building it, in order

    def _wire_stages(self, programs: Mapping[str, SegmentProgram]) -> None:
        """Which stages this rank runs, and what they send and receive."""
        plan, graph = self.plan, self.graph
        stages = [stage.segments for stage in plan.stages]
        self._schedules: dict[tuple[int, bool], PipelineSchedule] = {}  # by microbatches and whether it trains
        self._engines: dict[bool, PipelineEngine] = {}
        self.stage_rank = tuple(self._pipeline_coordinate(stage.ranks[0]) for stage in plan.stages)
        placements: Sequence[Sequence[int]] = [self.stage_rank]
        if self.grid.size("pp") > 1:  # what could not run is refused now rather than at the first step
            schedule = self.schedule(plan.microbatch.count)
            communicating_lists(schedule)
            placements = schedule.placements
        self._has_two_directions = len(placements) > 1
        self.wiring = wire(graph, programs, stages, placements)
        self._eval_wiring = wire(graph, programs, stages, placements, outputs=graph.outputs)
        rank = self.grid.coord("pp")
        self._own, self._own_eval = self.wiring.stages_of(rank), self._eval_wiring.stages_of(rank)
        self._counting = counting_stage(graph, self._eval_wiring, rank)

    def _specs(self, programs: Mapping[str, SegmentProgram]) -> dict[str, ParamSpec]:
        """How every parameter of the model lies on the ranks."""
        grid, plan = self.grid, self.plan
        self._cut = DataCut.of(plan.zero, plan.zero_extents, grid.state.size, grid.state_sizes)
        precision, sizes = self.workload.precision, grid.sizes
        return param_specs(self.graph, programs, self._eval_wiring, precision, cut=self._cut, sizes=sizes)

    def _join_groups(self, specs: Mapping[str, ParamSpec]) -> None:
        """Process groups for what stages share. Making one is collective: every rank makes all of them, in one order,
        before any holds values."""
        sizes = self.grid.sizes
        for cut in dict.fromkeys((self._cut, *(specs[name].state for name in sorted(specs)))):
            self.grid.make_data_groups(cut)
        self.grid.make_axes_groups({summed_axes(spec, sizes) for spec in specs.values()})
        mirrored = {(mirrors(spec), summed_axes(spec, sizes)) for spec in specs.values()}
        tied = [(subset, ()) for subset in tied_subsets(s for s in specs.values() if not mirrors(s))]
        self.written = written_buffers(self.graph, self._eval_wiring)
        joined: list[tuple[tuple[int, ...], tuple[str, ...]]] = [(entry.ranks, ()) for entry in self.written.values()]
        groups = [*tied, *joined, *mirrored]
        self.grid.make_pipeline_subgroups(entry for entry in groups if len(set(entry[0])) > 1)

    def _make_store(self, specs: Mapping[str, ParamSpec], adopt: bool) -> None:
        """This rank's shards of the parameters, with what steps them."""
        graph, workload = self.graph, self.workload
        by_index = {inst.index: inst for inst in graph.instances}
        names = {index: by_index[index].params for stage in self._own_eval for index in stage.instances}
        stage_of = {index: stage.index for stage in self._own_eval for index in stage.instances}
        if self._counting is not None:
            counting = self._counting.instances
            names |= {index: () for index in counting}
            stage_of |= {index: self._own_eval[0].index for index in counting if index not in stage_of}
        self.host = HostMemory(self.device)
        link = HostLink(self.host) if self.plan.memory_policy.optimizer_state == "host" else None
        storage = Storage(self.device, _real_tensors(workload.model) if adopt else {}, link)
        self.store = ParameterStore(
            specs, names, stage_of, self.grid, cut=self._cut, precision=workload.precision, storage=storage
        )
        self._by_hand = ByHand(self.store, graph, workload.model)
        self.scaler = loss_scaler(workload.precision)
        self._gradients_by_hand = GradientsByHand(self.store, self._by_hand.group)
        self._stepper = Stepper(workload.optimizer, self.store, self.scaler, before_asked=self._gradients_by_hand.asked)
        spec = workload.optimizer
        refuse_coupled(spec.name, spec.factory, spec.options, self.grid.size("pp"))

    def _make_buffers(self) -> None:
        counted = [self._counting] if self._counting is not None else []
        self.buffers = Buffers({})
        self._buffer_names = buffer_names(self.graph, [*self._own_eval, *counted])
        self._second = SecondDirection(self.buffers, self.written, self.grid) if self._has_two_directions else None

    def _make_runners(self) -> None:
        """What runs the stages, over the values that are there by now."""
        graph = self.graph
        self._keys = Keys(graph, self.workload.seed, self.device)
        self.recorder = Recorder(self.grid.rank, self.device)
        self._runners = [self._runner(self.wiring, stage) for stage in self._own]
        self._eval_runners = [self._runner(self._eval_wiring, stage) for stage in self._own_eval if not stage.direction]
        self._conditions = Conditions(graph, self.device, self.grid.ranks.numel())
        make = lambda stage: self._runner(self._eval_wiring, stage)  # noqa: E731
        of_each = self.plan.loss_over == "each"
        self._totals = BatchTotals(graph, self._counting, make, self._conditions, of_each=of_each)
        self.memory = MemoryMeter(self.device)
        self.memory.watch(self._runners, self.store, self.buffers)

    def _pipeline_coordinate(self, rank: int) -> int:
        return int((self.grid.ranks == rank).nonzero()[0][0])

    def _runner(self, wiring: Wiring, stage: Any) -> StageRunner:
        buffers = self._second if stage.direction and self._second is not None else self.buffers
        return StageRunner(self.graph, wiring, stage, self.store, buffers, self._keys, self.host)

    # values

    def load_values(self, values: Iterable[tuple[str, Any]] | None = None) -> None:
        """Fill parameters and buffers from (name, tensor) pairs, one at a time; each rank keeps its shards.

        A tensor is whole, or anything that gives a part of one when it is indexed by slices.
        """
        self.settle()
        constants = {n: self.graph.constants[n] for n in self._buffer_names if n in self.graph.constants}
        wanted = {*self.store.parameters, *self._buffer_names} - set(constants)
        missing = set(wanted)
        if values is None:
            values = initial_tensors(self.workload.model, wanted, seed=self.workload.seed)
        for name, value in values:
            name = name if name in wanted else self.graph.tied.get(name, name)
            if name in missing:
                missing.discard(name)
                self._fill(name, value)
        assert not missing, f"no values for {sorted(missing)[:4]}"
        self.buffers.tensors.update({name: value.to(self.device) for name, value in constants.items()})
        self.store.refresh()

    @torch.no_grad()
    def _fill(self, name: str, value: Any) -> None:
        if name in self.store.parameters:
            self.store.assign(name, value)
        else:
            whole = value[tuple(slice(0, size) for size in value.shape)]
            self.buffers.tensors[name] = whole.detach().to(self.device, self.graph.buffers[name][1], copy=True)

    def load_safetensors(self, path: str | Path) -> None:
        """Weights from a whole-model file or folder; each rank reads its shards alone. Buffers that the file lacks are
        computed as the model computes them."""
        self.settle()
        wanted = {*self.store.parameters, *self._buffer_names} - set(self.graph.constants)
        buffers = wanted - set(self.store.parameters)
        shapes = {name: self._shape_of(name) for name in wanted}
        on_every_rank(lambda: verify_sums(Path(path), self.grid.rank, num_ranks()))
        with ExitStack() as files:
            opened = on_every_rank(lambda: open_safetensors(path, files, shapes, self.graph.tied, optional=buffers))
            rest = buffers - set(opened)
            computed = on_every_rank(
                lambda: list(initial_tensors(self.workload.model, rest, seed=self.workload.seed)) if rest else []
            )
            weights = [f"model.{name}" for name in self.store.parameters]
            with self.half_loaded.watched([*weights, *(f"buffer.{name}" for name in self._buffer_names)]):
                for name, value in (*opened.items(), *computed):
                    self._fill(name, value)
        self.store.refresh()

    def _shape_of(self, name: str) -> tuple[int, ...]:
        return self.store.specs[name].shape if name in self.store.specs else self.graph.buffers[name][0]

    def save(self, path: str | Path) -> None:
        """A checkpoint folder, by torch.distributed.checkpoint. Every rank calls it."""
        self._begin()
        checkpoint.save(self, path)

    def load(self, path: str | Path) -> None:
        """A checkpoint folder of any layout of this model, or safetensors. Every rank calls it."""
        path = Path(path)
        if on_every_rank(lambda: path.suffix == ".safetensors" or (path.is_dir() and any(path.glob("*.safetensors")))):
            self.load_safetensors(path)
        else:
            checkpoint.load(self, path)
            self._stepper.was_asked = False  # steps are counted from the loaded one

    def state_dict(self) -> dict[str, torch.Tensor]:
        """This rank's part: model.NAME, buffer.NAME, optimizer.NAME.STATE. See runtime/checkpoint.py."""
        self.half_loaded.refuse()
        return checkpoint.state_dict(self)

    def load_state_dict(self, state: Mapping[str, torch.Tensor], strict: bool = True) -> None:
        """Of the same layout, or of whole tensors; by our keys, or those of the model's own state_dict().

        strict: raise ShardwrightError where a parameter is missing. A key that the model lacks always does."""
        checkpoint.load_state_dict(self, state, strict=strict)

    # batches

    @property
    def microbatch_size(self) -> int:
        return self.plan.microbatch.size

    def shard_batch(self, batch: Any) -> BatchPart:
        """This data-parallel rank's part of a global batch: what step() takes. See runtime/batch.py for the cut."""
        return self.microbatches.shard(batch)

    # steps

    def step(self, batch: Any) -> torch.Tensor:
        """One training step on this rank's part of the batch.

        Returns the loss: the mean over the microbatches (weighted by their samples, where the last is shorter), the
        same on every rank.
        """
        self._begin()
        loss = self._forward_backward(batch)
        self._gradients_by_hand.stepped()
        self._optimizer_step()
        return loss.wait()

    def forward_backward(self, batch: Any) -> torch.Tensor:
        """Loss and gradients, which are in .grad of the parameters, in the place of those of an earlier call."""
        self._begin()
        self._gradients_by_hand.replaced()
        loss = self._forward_backward(batch)
        self._gradients_by_hand.made()
        return loss.wait()

    @torch.no_grad()
    def _forward_backward(self, batch: Any) -> Summing:
        self.recorder.begin()
        self.memory.begin(self._optimizer)
        self.store.clear_gradients()
        parts = self.microbatches.split(batch)
        count = len(parts)
        self.store.begin_step(self._backward_uses(count))
        # a loss in float32 or wider carries the weight 1/count exactly enough; a narrower one gets it at the end, in
        # the precision of the reduction
        dtype = self.graph.values[self.graph.loss].dtype
        late = dtype not in (torch.float32, torch.float64)
        weights = self._weights(parts)
        factor = (count if late else 1.0) * (self.scaler.scale if self.scaler is not None else 1.0)
        # filled on the device: a copy from the host would wait for all that the device has been given. A scale that
        # the loss's dtype does not hold becomes infinite there, and the step is left out
        wide = {w: torch.full((), w * factor, dtype=torch.float64, device=self.device) for w in set(weights)}
        tangents = {w: tangent.to(dtype) for w, tangent in wide.items()}
        if self._second is not None:
            self._second.begin()
        before = dict(self.buffers.tensors)
        results = self._run(parts, self._runners, lambda k: tangents[weights[k]], training=True)
        if self._second is not None:
            self._second.join(sum(self.schedule(count).direction))
        with self.recorder.action("reduce", resource=COLLECTIVE):
            self.store.finish_gradients(1.0 / factor)
        try:
            self._conditions.look_at_forward()
        except ShardwrightError:  # nothing has come of this batch
            self.store.clear_gradients()
            self.buffers.tensors.update(before)
            raise
        return self._mean_loss(results, weights, self.graph)

    def _begin(self) -> None:
        """What the user has changed by hand since is followed. Every rank calls it before it computes or saves."""
        self.half_loaded.refuse()
        self.settle()
        asked, self._stepper.was_asked = self._stepper.was_asked, False
        if self._by_hand.follow(asked):
            self.step_index += 1
            self._gradients_by_hand.refuse_asked()

    @torch.no_grad()
    def optimizer_step(self) -> None:
        """Clip, step, bring the new parameters to where the segments read them, free the gradients.

        Raises ShardwrightError where gradients of several forward_backward() were to be added up for it."""
        refuse = self._gradients_by_hand.refuse()
        self._gradients_by_hand.stepped()
        self._optimizer_step(refuse)

    def zero_grad(self) -> None:
        """Let the gradients of the last forward_backward() go."""
        self.store.clear_gradients()
        self._gradients_by_hand.stepped()

    @torch.no_grad()
    def _optimizer_step(self, refuse: Callable[[], None] = lambda: None) -> None:
        with self.recorder.action("optimizer", resource=COMPUTE):
            self._stepper.step(self.optimizer, refuse)
            self.memory.end(self.optimizer, self._stepper.kept_bytes())
            self.store.clear_gradients()
        self.step_index += 1

    def not_a_step(self) -> AbstractContextManager[None]:
        """Inside, steps of the optimizer are no steps of the training."""
        return self._stepper.ours()

    def settle(self) -> None:
        """With post-validation: see the last step to its end. Whatever reads or writes parameters through the program
        does so; call it on every rank before you use parameters or gradients that you held on to."""
        self._stepper.settle()

    @property
    def grad_norm(self) -> torch.Tensor | None:
        """2-norm of the last step's gradient, before clipping; None where neither clipping nor skipping asks for it."""
        return self._stepper.grad_norm

    @torch.no_grad()
    def evaluate(self, batch: Any) -> torch.Tensor:
        """The loss of a batch as model.eval() has it, the same on every rank. Nothing is updated, buffers included.

        The first call captures the model in evaluation mode; every rank must make it."""
        parts, results, graph = self._evaluated(batch)
        return self._mean_loss(results, self._weights(parts), graph).wait()

    def _evaluated(self, batch: Any) -> tuple[list[MicrobatchPart], dict[int, dict[str, torch.Tensor]], ModelGraph]:
        self._begin()
        if self._make_evaluation is None:
            parts = self.microbatches.split(batch)
            results = self._run(parts, self._eval_runners, None, training=False)
            self._conditions.look_at_forward()
            return parts, results, self.graph
        evaluator = self._evaluation()
        parts, results = evaluator.losses(batch)
        return parts, results, evaluator.graph

    def _evaluation(self) -> Evaluator:
        if self._evaluator is None:
            assert self._make_evaluation is not None
            self._evaluator = Evaluator(self, self._make_evaluation())
        return self._evaluator

    @torch.no_grad()
    def outputs(self, batch: Any) -> list[Any]:
        """What the model returns in evaluation mode, one entry for each microbatch: of this data-parallel rank's
        samples, whole over the tensor axis. Empty on ranks without the last stage."""
        if self._make_evaluation is not None:
            self._begin()
            return self._evaluation().outputs(batch)
        _, results, _ = self._evaluated(batch)
        return [{name: results[k][name] for name in self.graph.outputs} for k in sorted(results)]

    def _weights(self, parts: list[MicrobatchPart]) -> list[float]:
        """Of each microbatch's loss in the batch's."""
        total = sum(part.size for part in parts)
        return [1.0 if self.plan.loss_over == "sum" else part.size / total for part in parts]

    def _run(
        self,
        parts: list[MicrobatchPart],
        runners: list[StageRunner],
        loss_grad: Callable[[int], torch.Tensor] | None,
        *,
        training: bool,
    ) -> dict[int, dict[str, torch.Tensor]]:
        self._totals.fill(parts, self.microbatches)
        variants = [self.microbatches.variants(part, runners) for part in parts]
        inputs = [self.microbatches.inputs(part, variant) for part, variant in zip(parts, variants, strict=True)]
        self._keys.begin(self.step_index, len(parts))
        try:
            with self._conditions.noting():
                if self.grid.size("pp") == 1:
                    return self._run_alone(variants, inputs, runners, loss_grad, training)
                by_number = {r.number: [variant[i] for variant in variants] for i, r in enumerate(runners)}
                work = Work(inputs, by_number, loss_grad or _no_grad_of_loss, training)
                self._engine(training).run(self.schedule(len(parts), training), work)
                return work.results
        finally:
            for runner in runners:
                runner.clear()

    def _run_alone(
        self,
        variants: list[list[Variant]],
        inputs: list[dict[str, torch.Tensor]],
        runners: list[StageRunner],
        loss_grad: Callable[[int], torch.Tensor] | None,
        training: bool,
    ) -> dict[int, dict[str, torch.Tensor]]:
        """No pipeline: all stages are here, and nothing is between them."""
        results: dict[int, dict[str, torch.Tensor]] = {}
        for k, (variant, entries) in enumerate(zip(variants, inputs, strict=True)):
            values: dict[str, torch.Tensor] = {}
            for i, runner in enumerate(runners):
                with self.recorder.action("F", runner.stage.index, k):
                    values = runner.forward(k, variant[i], entries, list(values.values()), training=training)
            results[k] = values
            if loss_grad is None:
                continue
            grads = {self.graph.loss: loss_grad(k)}
            for i in reversed(range(len(runners))):
                with self.recorder.action("B", runners[i].stage.index, k):
                    grads = runners[i].backward(k, variant[i], grads)
        return results

    def schedule(self, num_microbatches: int, training: bool = True) -> PipelineSchedule:
        """The order of actions of a step of so many microbatches."""
        key = num_microbatches, training
        if key not in self._schedules:
            place = self.stage_rank
            made = (
                schedule_for(self.plan, place, num_microbatches) if training else forward_order(place, num_microbatches)
            )
            self._schedules[key] = made
        return self._schedules[key]

    def _backward_uses(self, num_microbatches: int) -> dict[int, int]:
        """Instance on this rank -> microbatches whose backward it runs."""
        direction = [0] * num_microbatches
        if self.grid.size("pp") > 1:
            direction = self.schedule(num_microbatches).direction
        uses: Counter[int] = Counter()
        for stage in (runner.stage for runner in self._runners):
            for index in self.wiring.backward_runs.intersection(stage.instances):
                uses[index] += direction.count(stage.direction)
        return uses

    def _engine(self, training: bool) -> PipelineEngine:
        if training not in self._engines:
            runners = self._runners if training else self._eval_runners
            self._engines[training] = PipelineEngine(runners, self.device, self.grid.group("pp"), self.recorder)
        return self._engines[training]

    def _mean_loss(
        self, results: Mapping[int, Mapping[str, torch.Tensor]], weights: list[float], graph: ModelGraph
    ) -> Summing:
        """Other ranks than those of the last stage add nothing; none of them waits here."""
        dtype = graph.values[graph.loss].dtype
        total = torch.zeros((), dtype=torch.promote_types(dtype, torch.float32), device=self.device)
        for k, values in results.items():
            total = total + values[graph.loss].to(total.dtype) * weights[k]
        alone = self.grid.size("pp") == 1
        return Summing(total, None if alone else self.grid.group("pp"), alone=alone)

    # what a user looks at

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """Built from the workload on first use, or what was assigned; None where this rank holds nothing to train.

        Its state may be that of a step on trial: settle() first where that matters."""
        if not self._has_optimizer:
            self._take(build_optimizer(self.workload.optimizer, self.store))
        return self._optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.settle()
        if optimizer is not None:
            kind = type(optimizer)
            refuse_coupled(kind.__name__, kind, optimizer.defaults, self.grid.size("pp"))
        self._take(optimizer)

    def _take(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._optimizer, self._has_optimizer = optimizer, True
        if optimizer is not None:
            self._stepper.follow(optimizer)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """What this rank holds, by original name: DTensors, or plain tensors where one rank holds a stage alone."""
        self.settle()
        yield from self.store.parameters.items()

    def parameters(self) -> Iterator[nn.Parameter]:
        self.settle()
        yield from self.store.parameters.values()

    def gradients(self, full: bool = True) -> dict[str, torch.Tensor]:
        """Gradients of the last forward_backward() by name. full: whole tensors of the whole model, on every rank (a
        collective; for checks of small models). Otherwise this rank's, laid out as its parameters."""
        own = {name: p.grad for name, p in self.store.parameters.items() if p.grad is not None}
        if not full:
            return own
        whole = {name: self.store.whole(grad) for name, grad in own.items()}
        if self.grid.size("pp") == 1:
            return whole
        parts: list[Any] = [None] * self.grid.size("pp")
        dist.all_gather_object(parts, {name: grad.cpu() for name, grad in whole.items()}, group=self.grid.group("pp"))
        return {name: grad for part in parts for name, grad in part.items()}

    def named_buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        yield from self.buffers.tensors.items()

    def record_memory(self) -> None:
        """From the next step on the trace says what this rank holds, by kind, as each action begins and ends."""
        self.recorder.held = lambda: self.memory.held(self._optimizer)

    @property
    def trace(self) -> Trace:
        """Of the last step on this rank, in the simulator's format."""
        return self.recorder.trace()


def _no_grad_of_loss(microbatch: int) -> torch.Tensor:
    raise AssertionError("a forward-only schedule has no backward")


def _real_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if not p.is_meta}
