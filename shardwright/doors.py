"""@parallelize: a model class or factory whose instances plan, build and train themselves.

    @shardwright.parallelize(loss=my_loss)
    class Net(nn.Module): ...

    model = Net(64)
    for batch in batches:
        loss = model.step(batch)

Alone it runs in one process. Under torchrun each process builds its part of the same plan.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import api
from .amounts import byte_amount, gib_amount
from .devices import join_torchrun
from .errors import ShardwrightError
from .not_a_module import call_refusal, refusal
from .plans.document import Plan
from .profiler.calling import take_apart
from .profiler.cluster import Cluster
from .profiler.copies import carry_hooks_of
from .profiler.inputs import common_size
from .profiler.models import with_precision
from .profiler.workload import Loss, OptimizerSpec, Precision, Workload
from .runtime.batch import BatchPart
from .runtime.program import Program
from .watched_module import WatchedModule

Batch = Any  # what the model is called with; see profiler/calling.py


@dataclass(frozen=True)
class Settings:
    """What parallelize() was given."""

    hardware: Cluster | str
    loss: Loss | None
    inputs: tuple[Any, ...] | None
    batch_dims: Mapping[str, int | None] | None
    optimizer: OptimizerSpec
    precision: Precision | torch.dtype | str | None
    force: Mapping[str, Any]
    memory_limit_bytes: int | None
    time_limit_s: float | None
    seed: int
    meta: bool
    self_test: bool = True


def parallelize(
    factory: Callable[..., nn.Module] | None = None,
    *,
    hardware: Cluster | str = "local",
    loss: Loss | None = None,
    inputs: Sequence[Any] | None = None,
    batch_dims: Mapping[str, int | None] | None = None,
    optimizer: str | OptimizerSpec | Callable[..., torch.optim.Optimizer] = "AdamW",
    optimizer_options: Mapping[str, Any] | None = None,
    max_grad_norm: float | None = None,
    precision: Precision | torch.dtype | str | None = None,
    force: Mapping[str, Any] | None = None,
    memory_limit: int | str | None = None,
    memory_gib: float | None = None,
    time_limit_s: float | None = None,
    seed: int = 0,
    meta: bool = False,
    self_test: bool = True,
) -> Any:
    """Decorate a model class or factory: what it then returns is a Parallel.

    hardware: what to plan for; "local" is one device of this machine, or this torchrun job. loss(model_output, batch)
    -> scalar; None where the model's output is, or holds, the loss. inputs: the entries of the batch (names; positions
    in a tuple) that the model is given, where its forward does not say it; the loss gets all. batch_dims: the dimension
    of an entry that counts samples, None for an entry that all samples share; by default that is found out. optimizer:
    a name in torch.optim, an OptimizerSpec, or a function from parameters to an optimizer. precision: a dtype, or a
    Precision; by default that of the model's parameters. force: choices of the plan to keep, such as {"tp": 2}.
    memory_limit: per device, "600MiB" or bytes; memory_gib: the same as a number of GiB. seed: of dropout and other
    randomness in the model. meta: build the model without allocating it, and draw its first values shard by shard;
    for models too big for one process, whose modules can reset_parameters(). self_test: compare the captured graph
    with the module as written before planning.
    """
    settings = Settings(
        hardware=hardware,
        loss=loss,
        inputs=None if inputs is None else tuple(inputs),
        batch_dims=batch_dims,
        optimizer=_optimizer(optimizer, dict(optimizer_options or {}), max_grad_norm),
        precision=precision,
        force=dict(force or {}),
        memory_limit_bytes=_memory_limit(memory_limit, memory_gib),
        time_limit_s=time_limit_s,
        seed=seed,
        meta=meta,
        self_test=self_test,
    )

    def decorate(made_by: Callable[..., nn.Module]) -> Callable[..., Parallel]:
        @functools.wraps(made_by, updated=())
        def make(*arguments: Any, **keywords: Any) -> Parallel:
            join_torchrun(settings.hardware)
            return Parallel(_construct(made_by, arguments, keywords, settings.meta), settings)

        return make

    return decorate if factory is None else decorate(factory)


def _memory_limit(limit: int | str | None, gib: float | None) -> int | None:
    """In bytes."""
    if limit is not None and gib is not None:
        raise ShardwrightError(
            f"memory_limit={limit!r} and memory_gib={gib!r} are two limits of one memory",
            change="memory_limit or memory_gib",
            works=f"memory_gib={gib!r}",
        )
    return byte_amount(limit, "memory_limit") if gib is None else gib_amount(gib)


class Parallel:
    """A model that trains as its plan says. Planned and built at the first batch, whose shapes it needs."""

    def __init__(self, module: nn.Module, settings: Settings) -> None:
        self.settings = settings
        self.module = module
        self._program: Program | None = None
        self._watched: WatchedModule | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        raise call_refusal(type(self.module).__name__)

    def __getattr__(self, name: str) -> Any:
        module = self.__dict__.get("module")
        raise refusal(type(module).__name__, name)

    def __repr__(self) -> str:
        state = "not planned yet" if self._program is None else f"mesh {self.plan.mesh.model_dump()}"
        return f"Parallel({type(self.module).__name__}, {state})"

    # training

    def step(self, batch: Batch) -> torch.Tensor:
        """Forward, backward and optimizer step. Returns the loss, the same on every rank.

        batch: what the model is called with, and what the loss needs: a dictionary, a tuple, whatever forward takes.
        The global batch, the same on every rank; or this rank's part of it, as shard_batch() cuts it.
        """
        return self._training(batch, self.prepare(batch).step)

    def forward_backward(self, batch: Batch) -> torch.Tensor:
        """Loss, with gradients left in .grad of parameters(); optimizer_step() uses them."""
        return self._training(batch, self.prepare(batch).forward_backward)

    def _training(self, batch: Batch, run: Callable[[BatchPart], torch.Tensor]) -> torch.Tensor:
        assert self._watched is not None
        self._watched.refuse_changes()
        loss = run(self._part(batch))
        self._watched.note()  # a new shape was captured, which runs the module's own code
        return loss

    def optimizer_step(self) -> None:
        self.program.optimizer_step()

    def evaluate(self, batch: Batch) -> torch.Tensor:
        """The loss of a batch; nothing is updated."""
        program = self.prepare(batch)
        assert self._watched is not None
        with self._watched.running():
            return program.evaluate(self._part(batch))

    def shard_batch(self, batch: Batch) -> BatchPart:
        """This rank's part of a global batch. Needs a prepared model."""
        return self.program.shard_batch(batch)

    def _part(self, batch: Batch) -> BatchPart:
        return batch if isinstance(batch, BatchPart) else self.program.shard_batch(batch)

    # planning

    def prepare(self, batch: Batch) -> Program:
        """Plan and build for batches of these shapes, unless that is done. batch: a global batch."""
        if self._program is None:
            if isinstance(batch, BatchPart):
                raise ShardwrightError(
                    "the first batch is a part of one; planning needs the shapes of a global batch",
                    change="the first call",
                    works="model.prepare(global_batch), then model.step(model.shard_batch(global_batch))",
                )
            workload = self._workload(batch)
            settings = self.settings
            plan = api.plan(
                workload,
                settings.hardware,
                force=settings.force,
                memory_limit_bytes=settings.memory_limit_bytes,
                time_limit_s=settings.time_limit_s,
                self_test=settings.self_test,
            )
            alone = plan.mesh.num_devices == 1
            self._program = api.build(plan, workload, adopt=alone, self_test=settings.self_test)
            if not alone:
                release(self.module)  # each rank has its shards now
            self._watched = WatchedModule(self.module, self._program, released=not alone)
        return self._program

    def _workload(self, batch: Batch) -> Workload:
        tensors, _ = take_apart(batch)
        if not any(tensor.dim() for tensor in tensors.values()):
            raise ShardwrightError("the batch holds no tensor with a dimension", change="the batch", works="{'x': x}")
        size = common_size(tensors, self.settings.batch_dims or {})
        dtype = next((p.dtype for p in self.module.parameters() if p.dtype.is_floating_point), torch.float32)
        low = dtype in (torch.bfloat16, torch.float16)
        wide = torch.float32 if low else dtype
        workload = Workload(
            model=self.module,
            example_batch=dict(batch) if isinstance(batch, Mapping) else batch,
            global_batch=size,
            loss=self.settings.loss,
            optimizer=self.settings.optimizer,
            precision=Precision(compute=dtype, master=wide, grad_reduce=wide),
            batch_size=size,
            model_inputs=self.settings.inputs,
            batch_dims=self.settings.batch_dims,
            name=type(self.module).__name__,
            seed=self.settings.seed,
        )
        if self.settings.precision is not None:
            workload = with_precision(workload, self.settings.precision)
        return workload

    # what a user looks at

    @property
    def program(self) -> Program:
        if self._program is None:
            raise ShardwrightError(
                f"{type(self.module).__name__} is not planned yet: its first batch gives the shapes",
                change="call prepare() or step() first",
                works="model.prepare(batch)",
            )
        return self._program

    @property
    def plan(self) -> Plan:
        return self.program.plan

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """None on a rank that holds nothing to train. Assign another to replace it."""
        return self.program.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        self.program.optimizer = optimizer

    def parameters(self) -> Iterator[nn.Parameter]:
        """What this rank holds: DTensors where they are sharded."""
        return self.program.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return self.program.named_parameters()


def _construct(make: Callable[..., nn.Module], arguments: Any, keywords: Any, meta: bool) -> nn.Module:
    """Every rank draws the first values that rank 0 draws."""
    if meta:
        with torch.device("meta"):
            return make(*arguments, **keywords)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make(*arguments, **keywords)
    state = [torch.get_rng_state()]
    dist.broadcast_object_list(state, src=0)
    if dist.get_rank() == 0:
        return make(*arguments, **keywords)
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state[0])
        return make(*arguments, **keywords)


def release(module: nn.Module) -> None:
    """Replace the values of parameters and buffers by meta tensors of the same shapes; tied ones stay tied."""
    replaced: dict[int, torch.Tensor] = {}
    for owner in module.modules():
        for table in (owner._parameters, owner._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    empty = torch.empty_like(tensor, device="meta")
                    is_parameter = isinstance(tensor, nn.Parameter)
                    replaced[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if is_parameter else empty
                    carry_hooks_of(tensor, replaced[id(tensor)])  # another batch shape is captured from this model
                table[name] = replaced[id(tensor)]  # type: ignore[assignment]


_STATE_TENSORS = {"SGD": 0, "Adagrad": 1, "RMSprop": 1}  # others are taken to keep two, as Adam does


def _optimizer(
    given: str | OptimizerSpec | Callable[..., torch.optim.Optimizer],
    options: dict[str, Any],
    max_grad_norm: float | None,
) -> OptimizerSpec:
    if isinstance(given, OptimizerSpec):
        return given
    if isinstance(given, str):
        found = {name.lower(): name for name in vars(torch.optim) if isinstance(getattr(torch.optim, name), type)}
        if given.lower() not in found:
            raise ShardwrightError(f"torch.optim has no {given!r}", change="optimizer=", works="optimizer='AdamW'")
        name = found[given.lower()]
        factory: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, name)
    else:
        factory, name = given, getattr(given, "__name__", "optimizer")
    state_tensors = _STATE_TENSORS.get(name, 2) + (name == "SGD" and options.get("momentum", 0) > 0)
    return OptimizerSpec(name, factory, options, state_tensors, max_grad_norm)
