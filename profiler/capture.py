"""Workload in, ModelGraph out: torch.export, normalization, folding, one joint trace for each distinct segment.

Nothing is allocated and no device is touched: parameters may live on meta, everything is traced with fake tensors.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import hashlib
import io
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

from ..errors import ExitCode, ShardwrightError
from ..kernels import ops  # noqa: F401  registers the ops that normalization puts in
from . import fold, joint
from ._torch import DATA_DEPENDENT, helpers_lines_kept, lazy_recompile, lines_kept
from .as_written import AsWritten
from .assumptions import Assumptions, separate_conditions
from .attention_interface import shardwright_attention
from .batches import batch_dims_of, make_batch
from .calling import PLAIN_CALL, Call
from .cumulative_norms import cumulative_norms
from .global_loss import Totals, separate_totals
from .graph import Leaf, ModelGraph, Segment, SegmentInstance, ValueInfo
from .inputs import example_batch_size
from .loss_over import loss_over
from .nodes import value
from .normalize import normalize
from .outside_random import refused_outside_random
from .recurrent_layers import recurrent_layers
from .scans import scans
from .slots import JointSignature
from .unregistered import refuse_unregistered
from .watch import tell
from .where import is_users_file, users_frame
from .workload import Loss, Workload

ROOT = "model"
CANNOT_CAPTURE = "the model cannot be captured"


class TrainingStep(nn.Module):
    """model and loss as one module over a dictionary of tensors: what is exported."""

    with_output = False

    def __init__(self, model: nn.Module, loss: Loss | None, call: Call = PLAIN_CALL) -> None:
        super().__init__()
        self.model, self.call = model, call
        self.loss = loss if loss is None else lambda output, batch: loss(output, batch)  # not as a module within this
        self.begin: Callable[[], None] = lambda: None
        self.verified: Callable[[torch.Tensor], torch.Tensor] = lambda loss: loss

    def forward(self, batch: dict[str, torch.Tensor]) -> Any:
        self.begin()
        output, given = self.call.output(self.model, batch, with_loss=self.loss is not None)
        found = self.verified(_loss_of(self.model, self.loss, output, given))
        return (found, output) if self.with_output else found


class EvaluationStep(TrainingStep):
    """The loss, and what the model returns."""

    with_output = True


def compute_loss(model: nn.Module, loss: Loss | None, tensors: Any, call: Call = PLAIN_CALL) -> torch.Tensor:
    """Call the model as its user does, then the loss. tensors: by name. Also what the reference runs."""
    return _loss_of(model, loss, *call.output(model, tensors, with_loss=loss is not None))


def _loss_of(model: nn.Module, loss: Loss | None, output: Any, batch: Any) -> torch.Tensor:
    if loss is not None:
        return loss(output, batch)
    if isinstance(output, torch.Tensor) and output.dim() == 0:
        return output
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, dict):
        found = output.get("loss")
    if (
        found is None
        and isinstance(output, (tuple, list))
        and isinstance(output[0], torch.Tensor)
        and output[0].dim() == 0
    ):
        found = output[0]
    if found is None:
        raise ShardwrightError(
            f"{type(model).__name__} returned {_form_of(output)} without a loss",
            means="the training step has no scalar to differentiate",
            change="Workload(loss=...), or pass the labels that make the model compute its own",
            works="Workload(..., loss=lambda output, batch: F.cross_entropy(output, batch['targets']))",
        )
    return found


def _form_of(output: Any) -> str:
    return f"a tensor of shape {tuple(output.shape)}" if isinstance(output, torch.Tensor) else type(output).__name__


def capture(workload: Workload, *, evaluating: bool = False) -> ModelGraph:
    """Trace the workload's training step at the shapes of its example batch. evaluating: what model.eval() computes
    instead, without gradients, and what the model returns beside the loss."""
    tell(f"capturing {workload.name}: tracing its {'evaluation' if evaluating else 'step'}")
    written = AsWritten(workload.model)
    exported, batch = export_step(workload, written=written, evaluating=evaluating), workload.example_batch
    signature = exported.graph_signature
    graph_module, graph = exported.graph_module, exported.graph_module.graph
    placeholders = {n.name: n for n in graph.nodes if n.op == "placeholder"}
    param_fqn = {p: _strip(fqn) for p, fqn in signature.inputs_to_parameters.items()}
    buffer_fqn = _one_placeholder_each(graph, workload.model, signature.inputs_to_buffers)
    buffer_fqn |= {p: f"constant:{name}" for p, name in signature.inputs_to_lifted_tensor_constants.items()}
    user_inputs = dict(zip(signature.user_inputs, [f"input:{name}" for name in batch], strict=True))
    # a constant is made anew by each forward: what is written to it does not outlive the step
    lasting = {p for p, fqn in buffer_fqn.items() if not fqn.startswith("constant:")}
    mutated, key = normalize(graph_module, param_fqn.keys(), lasting, written.hooks.place)
    dims = batch_dims_of(workload)
    samples = {placeholders[n] for n, name in user_inputs.items() if name.removeprefix("input:") in dims}
    state = {*(placeholders[n] for n in (*param_fqn, *mutated)), key}
    totals = separate_totals(graph, samples, state)
    conditions, later = separate_conditions(graph, state)
    user_inputs |= {name: f"input:{entry}" for name, entry in totals.placeholders.items()}
    nodes_of = lambda names: {placeholders[n] for n in names if n in placeholders}  # noqa: E731
    returned = next(n for n in reversed(graph.nodes) if n.op == "output").args[0]
    returned = returned[: len(exported.graph_signature.user_outputs)]
    loss_node = returned[0]
    if not isinstance(loss_node, fx.Node):
        raise ShardwrightError("the loss is a constant", means="it does not depend on the model", change="loss")
    pieces = fold.cut(
        graph,
        workload.model,
        ROOT,
        nodes_of(param_fqn),
        nodes_of(buffer_fqn),
        {placeholders[name]: new for name, new in mutated.items()},
        [*(n for n in returned if isinstance(n, fx.Node)), *mutated.values(), *totals.nodes.values(), *conditions],
    )
    traced = _Traced(exported, returned, key, mutated, param_fqn, buffer_fqn, user_inputs, totals)
    try:
        made, names = _assemble(workload, traced, pieces, evaluating)
    except DATA_DEPENDENT as error:
        raise _capture_error(error) from error
    made.conditions = {names[node]: line for node, line in conditions.items()}
    made.later_conditions = tuple(later)
    made.attributes_set = tuple(written.attributes.changed)
    return made


def _one_placeholder_each(graph: fx.Graph, model: nn.Module, buffers: dict[str, str]) -> dict[str, str]:
    """Placeholder -> name of the buffer: of modules that stand in several places, the name that named_buffers gives.

    Where one buffer has several placeholders, all readers get the first.
    """
    canonical: dict[int, str] = {id(buffer): name for name, buffer in model.named_buffers()}
    names = {name: canonical[id(buffer)] for name, buffer in model.named_buffers(remove_duplicate=False)}
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    found: dict[str, str] = {}
    first: dict[str, fx.Node] = {}
    for placeholder, fqn in buffers.items():
        found[placeholder] = name = names.get(_strip(fqn), _strip(fqn))
        node = nodes[placeholder]
        if first.setdefault(name, node) is not node:
            node.replace_all_uses_with(first[name])
    return found


def _strip(fqn: str) -> str:
    return fqn.removeprefix(ROOT + ".")


def export_step(
    workload: Workload,
    symbolic: Mapping[str, Sequence[int]] | None = None,
    *,
    written: AsWritten | None = None,
    evaluating: bool = False,
) -> Any:
    """The exported training step. symbolic: dimensions of entries that are traced with a symbol each, not a number.
    written: records what the trace of the forward loses; what it records is for the caller to place. evaluating: the
    loss and what the model returns, as after model.eval()."""
    # torch.export takes two arguments that are the same tensor for one: give it distinct ones
    batch = {
        name: t.clone() if t.device.type != "meta" else torch.empty_like(t)
        for name, t in workload.example_batch.items()
    }
    if any(parameter.is_meta for parameter in workload.model.parameters()):  # as after its values went to the ranks
        batch = {name: torch.empty_like(tensor, device="meta") for name, tensor in batch.items()}
    step = (EvaluationStep if evaluating else TrainingStep)(workload.model, workload.loss, workload.call)
    shapes = None if symbolic is None else {n: dict.fromkeys(symbolic.get(n, ()), Dim.AUTO) for n in batch}
    written = written or AsWritten(workload.model)
    step.begin = written.begin
    assumptions = Assumptions(lambda: _real_entries(workload))
    step.verified = lambda loss: _finished(loss, written, assumptions, workload.loss)
    try:
        with (
            warnings.catch_warnings(),
            own_errors_alone(),
            _mode_of(workload.model, evaluating),
            shardwright_attention(workload.model),
            lazy_recompile(),
            lines_kept(),
            helpers_lines_kept(is_users_file),
            no_collection(),
            refused_outside_random(workload.model),
            recurrent_layers(),
            cumulative_norms(),
            scans(workload.model),
            torch.enable_grad(),
            written.recorded(),
            assumptions,
        ):
            warnings.simplefilter("ignore")
            return torch.export.export(step, (batch,), dynamic_shapes=shapes and (shapes,), strict=False)
    except ShardwrightError:
        raise
    except Exception as error:
        raise _capture_error(error) from error


def _finished(
    loss: torch.Tensor, written: AsWritten, assumptions: Assumptions, loss_function: Loss | None
) -> torch.Tensor:
    """What is done at the end of the forward, while its trace still runs."""
    written.end()
    refuse_unregistered(loss, loss_function)
    return assumptions.verified(loss)


def _real_entries(workload: Workload) -> Mapping[str, torch.Tensor]:
    batch = workload.example_batch
    return make_batch(workload) if any(t.is_meta for t in batch.values()) else batch


@contextlib.contextmanager
def own_errors_alone() -> Iterator[None]:
    """Keep back what torch.export prints and logs before it raises: the error says it in the user's terms."""
    logger = logging.getLogger("torch")
    level, text = logger.level, io.StringIO()
    logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(text):
            yield
        sys.stderr.write(text.getvalue())  # what the model itself had to say
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _mode_of(model: nn.Module, evaluating: bool) -> Iterator[None]:
    """evaluating: inside, the model is as after model.eval()."""
    before = [(module, module.training) for module in model.modules()]
    try:
        if evaluating:
            model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Hold the garbage collector back: a trace makes millions of objects that live, and walking them is a quarter."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _capture_error(error: Exception) -> ShardwrightError:
    """Name the op and the user's own line."""
    frame = users_frame(traceback.extract_tb(error.__traceback__))
    text = f"{type(error).__name__} {error}".lower()
    on_data = any(sign in text for sign in ("datadependent", "data-dependent", "data dependent", "could not guard"))
    reason = str(error).strip().split("\n")[0][:300] or type(error).__name__
    return ShardwrightError(
        f"{CANNOT_CAPTURE}: {type(error).__name__}: {reason}",
        means=f"torch.export stopped at {frame.filename}:{frame.lineno} in {frame.name}: {frame.line or ''}".rstrip(),
        change="that line: control flow may depend on shapes and settings, not on the data in a tensor"
        if on_data
        else "that line, which fails under torch.export",
        works="torch.where(condition, a, b) in place of `if condition:`"
        if on_data
        else "a model that torch.export.export(model, (), batch, strict=False) takes",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


@dataclasses.dataclass(frozen=True)
class _Traced:
    """The normalized graph of the whole step, and what its placeholders stand for, by their names."""

    exported: Any
    returned: Sequence[Any]  # the loss, then what the model returns
    key: fx.Node
    mutated: Mapping[str, fx.Node]  # written buffers: what they hold afterwards
    params: Mapping[str, str]
    buffers: Mapping[str, str]
    inputs: Mapping[str, str]
    totals: Totals

    @property
    def graph(self) -> fx.Graph:
        return self.exported.graph_module.graph


def _assemble(
    workload: Workload, traced: _Traced, pieces: list[fold.Piece], evaluating: bool
) -> tuple[ModelGraph, dict[fx.Node, str]]:
    """The graph, and the names of the values that cross its segments' edges."""
    graph, returned, totals = traced.graph, traced.returned, traced.totals
    model, param_fqn, buffer_fqn, user_inputs = workload.model, traced.params, traced.buffers, traced.inputs
    canonical, tied = _canonical_params(model, param_fqn)
    trained = {p for p, fqn in param_fqn.items() if _parameter(model, fqn).requires_grad and not evaluating}
    requires_grad = _requires_grad(graph, trained)
    if returned[0] not in requires_grad and not evaluating:
        raise _nothing_to_train(workload)
    result = ModelGraph(
        name=workload.name,
        segments={},
        instances=[],
        values={},
        input_names=tuple(user_inputs.values()),
        params={},
        buffers={},
        tied=tied,
    )
    for fqn in canonical.values():
        parameter = _parameter(model, fqn)
        result.params[fqn] = (tuple(parameter.shape), parameter.dtype, parameter.requires_grad)
    value_name: dict[fx.Node, str] = {n: user_inputs[n.name] for n in graph.nodes if n.name in user_inputs}
    for node, name in value_name.items():
        result.values[name] = ValueInfo(name, tuple(value(node).shape), value(node).dtype, False)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    names: dict[str, str] = {}
    written = {node: placeholder for placeholder, node in traced.mutated.items()}
    for index, piece in enumerate(pieces):
        updates = [n for n in piece.nodes if n in written]
        for placeholder in (_placeholder(graph, written[n]) for n in updates):
            if placeholder not in piece.buffers:  # written for the second time: it reads what the first write left
                piece.buffers.append(placeholder)
        piece.outputs = [n for n in piece.outputs if n not in written or _read_elsewhere(n, piece)]
        for node in updates:  # also a buffer that is overwritten unread
            buffer = _placeholder(graph, written[node])
            if buffer not in piece.buffers:
                piece.buffers.append(buffer)
        slots = tuple(piece.buffers.index(_placeholder(graph, written[n])) for n in updates)
        positions = [(piece.nodes.index(n), slot) for n, slot in zip(updates, slots, strict=True)]
        digest = fold.structure_hash(
            piece, lambda n: _facts(n, requires_grad), extra=str(positions) if positions else "[]"
        )
        if digest not in names:
            names[digest] = f"{'prologue' if piece.prologue else 'segment'}{len(names)}"
            tell(f"capturing {workload.name}: the backward of {names[digest]}, at part {index + 1} of {len(pieces)}")
            result.segments[names[digest]] = _segment(
                names[digest], digest, piece, updates, slots, traced.key, requires_grad, mode
            )
        segment = result.segments[names[digest]]
        outputs = tuple(f"{names[digest]}.{index}/{i}" for i in range(len(piece.outputs)))
        for node, name, info in zip(piece.outputs, outputs, segment.outputs, strict=True):
            value_name[node] = name
            result.values[name] = ValueInfo(name, info.shape, info.dtype, info.requires_grad)
        for node in piece.buffers:
            result.buffers[buffer_fqn[node.name]] = (tuple(value(node).shape), value(node).dtype)
        result.instances.append(
            SegmentInstance(
                index=index,
                segment=names[digest],
                params=tuple(canonical[n.name] for n in piece.params),
                buffers=tuple(buffer_fqn[n.name] for n in piece.buffers),
                inputs=tuple(value_name[n] for n in piece.inputs),
                outputs=outputs,
                random_base=piece.random_base,
                module_path=piece.module_path,
            )
        )
    loss_node = returned[0]
    result.loss = value_name[loss_node]
    if evaluating:
        result.outputs, result.output_leaves = _outputs(returned, value_name, model)
        result.output_form = traced.exported.call_spec.out_spec
    result.totals = {entry: (value_name[node], totals.kinds[entry]) for entry, node in totals.nodes.items()}
    result.loss_over = loss_over(graph, loss_node, example_batch_size(workload), totals.placeholders)
    result.batch_size = example_batch_size(workload)
    result.batch_dims = batch_dims_of(workload)
    result.structure_hash = _model_hash(result)
    result.constants = {f"constant:{k}": v for k, v in traced.exported.constants.items() if isinstance(v, torch.Tensor)}
    return result, value_name


def _outputs(
    returned: Sequence[Any], value_name: Mapping[fx.Node, str], model: nn.Module
) -> tuple[tuple[str, ...], tuple[Any, ...]]:
    """Names of the values that the model returns, and every leaf of what it returns: a Leaf, or what is no tensor."""
    leaves = []
    for item in returned:
        if isinstance(item, fx.Node) and item not in value_name:
            raise ShardwrightError(
                f"{type(model).__name__} returns {item.name}, a parameter or a buffer",
                means="its parts lie on several ranks",
                change="what the model returns",
                works="program.named_parameters(), or program.evaluate(batch) for the loss alone",
                exit_code=ExitCode.UNSUPPORTED_MODEL,
            )
        leaves.append(Leaf(value_name[item]) if isinstance(item, fx.Node) else item)
    names = dict.fromkeys(leaf.name for leaf in leaves if isinstance(leaf, Leaf))
    return tuple(names), tuple(leaves)


def _nothing_to_train(workload: Workload) -> ShardwrightError:
    parameters = list(workload.model.parameters())
    frozen = sum(not parameter.requires_grad for parameter in parameters)
    return ShardwrightError(
        f"no gradient comes through the loss of {workload.name}; {frozen} of {len(parameters)} parameters are frozen",
        means="PyTorch's loss.backward() refuses it too: the loss does not require a gradient",
        change="requires_grad of the parameters to train, or the detach() or no_grad() between them and the loss",
        works="a model for which loss.requires_grad is True",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )


def _read_elsewhere(node: fx.Node, piece: fold.Piece) -> bool:
    inside = set(piece.nodes)
    return any(user not in inside and user.op != "output" for user in node.users)


def _placeholder(graph: fx.Graph, name: str) -> fx.Node:
    return next(n for n in graph.nodes if n.op == "placeholder" and n.name == name)


def _parameter(model: nn.Module, fqn: str) -> nn.Parameter:
    return model.get_parameter(fqn)


def _canonical_params(model: nn.Module, param_fqn: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """One FQN for each distinct parameter object; the others are tied to it."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for fqn, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[fqn] = first[id(parameter)]
        else:
            first[id(parameter)] = fqn
    return {p: tied.get(fqn, fqn) for p, fqn in param_fqn.items()}, tied


def _requires_grad(graph: fx.Graph, trainable: set[str]) -> set[fx.Node]:
    """Nodes that a gradient can reach: floating values that depend on a trainable parameter, through no detach."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        val = value(node)
        if node.name in trainable:
            found.add(node)
        elif node.op == "call_function" and node.target is not torch.ops.aten.detach.default:
            tensors = val if isinstance(val, (tuple, list)) else [val]
            floating = any(isinstance(t, torch.Tensor) and (t.is_floating_point() or t.is_complex()) for t in tensors)
            if floating and any(n in found for n in node.all_input_nodes):
                found.add(node)
    return found


def _facts(node: fx.Node, requires_grad: set[fx.Node]) -> str:
    val = value(node)
    if not isinstance(val, torch.Tensor):
        return repr(val)
    return f"{tuple(val.shape)}{tuple(val.stride())}{val.dtype}{node in requires_grad}"


def _segment(
    name: str,
    digest: str,
    piece: fold.Piece,
    updates: list[fx.Node],
    slots: tuple[int, ...],
    key: fx.Node,
    requires_grad: set[fx.Node],
    mode: FakeTensorMode,
) -> Segment:
    forward, outputs, _ = joint.forward_module(piece, updates, key)
    fake = lambda nodes: [joint.fake_like(value(n), mode) for n in nodes]  # noqa: E731
    flags = lambda nodes: [n in requires_grad for n in nodes]  # noqa: E731
    with mode:
        key_value = torch.empty(4, dtype=torch.int64)
    signature = JointSignature(
        flags(piece.params), len(piece.buffers), flags(piece.inputs), len(updates), flags(outputs)
    )
    arguments = [*fake(piece.params), *fake(piece.buffers), *fake(piece.inputs), key_value]
    traced = joint.trace_joint(forward, signature, arguments, fake(outputs))
    return Segment(
        name=name,
        joint=traced,
        forward=forward,
        param_shapes=tuple(tuple(value(n).shape) for n in piece.params),
        param_dtypes=tuple(value(n).dtype for n in piece.params),
        param_requires_grad=tuple(flags(piece.params)),
        num_buffers=len(piece.buffers),
        mutated_buffers=slots,
        inputs=tuple(
            ValueInfo(n.name, tuple(value(n).shape), value(n).dtype, n in requires_grad) for n in piece.inputs
        ),
        outputs=tuple(ValueInfo(n.name, tuple(value(n).shape), value(n).dtype, n in requires_grad) for n in outputs),
        has_random=piece.num_random > 0,
        structure_hash=digest,
        is_prologue=piece.prologue,
    )


def _model_hash(graph: ModelGraph) -> str:
    """Of the ops, the wiring and the parameters; not of the batch size, so that a plan fits other captures."""
    parts: list[str] = []
    for segment in graph.segments.values():
        parts.append(segment.name + ",".join(f"{n.name}:{n.target}" for n in segment.joint.graph.nodes))
    parts += [f"{i.segment}{i.params}{i.buffers}{i.inputs}{i.outputs}" for i in graph.instances]
    parts += [f"{fqn}{shape}{grad}" for fqn, (shape, _, grad) in graph.params.items()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]
