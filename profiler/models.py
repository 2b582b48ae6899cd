"""load_workload: from what a user names (a configuration, a preset, a function of theirs) to a Workload."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ExitCode, ShardwrightError
from . import diffusion, hf
from .calling import named_entries, take_apart
from .copies import carry_hooks, copy_workload
from .hf_batches import default_seq_len, fields_for
from .initial_values import materialize
from .inputs import common_size, draw_batch
from .losses import denoising, loss_of
from .model_kinds import KINDS
from .near import near_matches
from .small_models import SMALL_MODELS
from .user_model import call_factory
from .workload import LossScaling, OptimizerSpec, Precision, Workload

_PRESET_DIR = Path(__file__).parent / "presets"
_DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16,
    "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32,
    "fp64": torch.float64, "float64": torch.float64,
}  # fmt: skip
# name -> (class in torch.optim, tensors of a parameter's size that it keeps)
_OPTIMIZERS = {
    "adamw": ("AdamW", 2), "adam": ("Adam", 2), "nadam": ("NAdam", 2), "radam": ("RAdam", 2), "adamax": ("Adamax", 2),
    "sgd": ("SGD", 0), "adagrad": ("Adagrad", 1), "rmsprop": ("RMSprop", 1),
}  # fmt: skip


@dataclass(frozen=True)
class ModelRow:
    """One line of `shardwright models`. seq_len is None where the model has no sequence."""

    name: str
    family: str
    kind: str
    num_params: int
    seq_len: int | None
    note: str


@functools.cache
def _presets() -> dict[str, dict[str, Any]]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(_PRESET_DIR.glob("*.json"))}


def list_models() -> list[ModelRow]:
    """The presets, small to large in each family. Needs neither torch's nor transformers' help: figures are stored."""
    rows = [
        ModelRow(name, p["family"], p["kind"], p["num_params"], p.get("seq_len"), p.get("note", ""))
        for name, p in _presets().items()
    ]
    return sorted(rows, key=lambda row: (row.family, row.num_params, row.name))


def load_workload(
    spec: str,
    *,
    global_batch: int | None = None,
    seq_len: int | None = None,
    batch_size: int = 2,
    precision: Precision | torch.dtype | str | None = None,
    overrides: Mapping[str, Any] | None = None,
    optimizer: str | OptimizerSpec = "adamw",
    device: torch.device | str = "meta",
    seed: int = 0,
    kind: str | None = None,
) -> Workload:
    """The training job that `spec` names.

    spec: "hf:PATH" a transformers configuration file or its folder; "diffusers:PATH" that of a diffusers model;
    "preset:NAME"; "package.module:factory" or "path/to/file.py:factory", a function without required arguments that
    returns a Workload, or (module, batch) with the batch a dictionary of tensors by the names of forward's arguments.
    global_batch: samples in a step; default batch_size. seq_len: tokens in a sample, default that of the preset or the
    model's own, at most 4096; models without a sequence take no notice of it. batch_size: samples in the example
    batch. precision: a dtype (or its name) for everything, except that bf16 and fp16 keep a float32 master copy;
    default bf16.
    overrides: settings of the configuration by name, for smaller versions (num_layers, hidden_size, num_heads, ...).
    kind: how an hf: model is trained, where its configuration leaves that open or names another head (KINDS).
    device: "meta" (no memory, any size), or where real values are wanted. A user's model keeps the device it came with,
    unless device is given as other than meta.
    Raises ShardwrightError for what the user can mend.
    """
    if batch_size < 1 or (global_batch is not None and global_batch < 1):
        raise ShardwrightError(
            f"batch_size={batch_size}, global_batch={global_batch}",
            means="a step needs at least one sample",
            change="--global-batch",
            works="--global-batch 8",
        )
    chosen = _precision(precision)
    options = _Options(global_batch or batch_size, seq_len, batch_size, chosen, dict(overrides or {}), seed, kind)
    scheme, _, rest = spec.partition(":")
    if scheme == "hf":
        workload = _from_config(spec, hf.read_config(rest), None, Path(rest).stem, options)
    elif scheme == "diffusers":
        workload = _from_diffusers(spec, diffusion.read_config(rest), options)
    elif scheme == "preset":
        workload = _from_preset(spec, rest, options)
    elif rest:
        workload = _from_factory(spec, options, given=precision is not None, batch_given=global_batch)
    else:
        raise _unknown_model(spec)
    if workload.spec.get("kind") != "factory" or optimizer != "adamw":
        workload = dataclasses.replace(workload, optimizer=_optimizer(optimizer))
    if isinstance(optimizer, str):
        workload = dataclasses.replace(workload, spec={**workload.spec, "optimizer": optimizer})
    if torch.device(device).type != "meta":
        workload = materialize(workload, device)
    return workload


def reload_workload(spec: Mapping[str, Any], **changes: Any) -> Workload:
    """The Workload that a Workload.spec describes, with some of load_workload's arguments changed."""
    names = ("global_batch", "seq_len", "batch_size", "overrides", "optimizer", "seed")
    arguments: dict[str, Any] = {name: spec[name] for name in names if name in spec}
    if spec.get("kind") in KINDS and str(spec["model"]).startswith("hf:"):
        arguments["kind"] = spec["kind"]
    if "precision" in spec:
        arguments["precision"] = _named_precision(spec["precision"])
    workload = load_workload(spec["model"], **{**arguments, **changes})
    dims = spec.get("batch_dims")
    if dims is None or set(dims) != set(workload.example_batch):
        return workload
    return dataclasses.replace(workload, batch_dims=dims)


def with_precision(workload: Workload, precision: Precision | torch.dtype | str) -> Workload:
    """The same job, with parameters, activations, reductions and real-valued inputs in another precision.

    Casts the model's floating-point parameters and buffers (a copy; the given workload is untouched). Casts that the
    model's own code makes inside its forward are widened by reference_dtype.widened, which capture and reference share.
    """
    chosen = _precision(precision)
    copied = copy_workload(workload)
    model = copied.model
    old = workload.precision.compute
    _cast(model, old, chosen.compute)
    carry_hooks(workload.model, model)
    batch = {
        name: tensor.to(chosen.compute) if tensor.dtype.is_floating_point else tensor
        for name, tensor in workload.example_batch.items()
    }
    spec = {**workload.spec, "precision": _precision_names(chosen)} if workload.spec else workload.spec
    return dataclasses.replace(copied, example_batch=batch, precision=chosen, spec=spec)


def make_reference_dtype(workload: Workload, dtype: torch.dtype = torch.float64) -> Workload:
    """The job with everything in dtype, for checks."""
    return with_precision(workload, Precision(compute=dtype, master=dtype, grad_reduce=dtype))


@dataclass(frozen=True)
class _Options:
    global_batch: int
    seq_len: int | None
    batch_size: int
    precision: Precision
    overrides: dict[str, Any]
    seed: int
    kind: str | None = None

    def spec(self, model: str, kind: str, seq_len: int | None) -> dict[str, Any]:
        return {
            "model": model,
            "kind": kind,
            "global_batch": self.global_batch,
            "seq_len": seq_len,
            "batch_size": self.batch_size,
            "precision": _precision_names(self.precision),
            "overrides": self.overrides,
            "seed": self.seed,
        }


def _from_preset(spec: str, name: str, options: _Options) -> Workload:
    preset = _presets().get(name)
    if preset is None:
        raise _unknown_model(spec)
    if "builder" in preset:
        return _from_small(spec, name, preset["builder"], options)
    return _from_config(spec, preset["config"], preset, name, options)


def _from_small(spec: str, name: str, builder: str, options: _Options) -> Workload:
    small = SMALL_MODELS[builder]
    for key in options.overrides:
        if key not in small.options:
            raise ShardwrightError(
                f"{name} has no setting {key!r}",
                means=f"its settings: {', '.join(small.options)}",
                change=f"the override {key}={options.overrides[key]}",
                works=", ".join(f"{k}={v}" for k, v in list(small.options.items())[:2]),
            )
    settings = {**small.options, **options.overrides}
    with torch.device("meta"):
        model = small.build(**settings).to(options.precision.compute)
    batch = draw_batch(small.fields(settings, options.precision.compute), options.batch_size, "meta")
    return Workload(
        model=model, example_batch=batch, global_batch=options.global_batch, loss=small.loss,
        precision=options.precision, batch_size=options.batch_size, tokens_per_sample=1, name=name,
        spec={**options.spec(spec, "small", None), "builder": builder}, seed=options.seed,
    )  # fmt: skip


def _from_config(
    spec: str, config_json: dict[str, Any], preset: dict[str, Any] | None, name: str, options: _Options
) -> Workload:
    config = hf.config_object(config_json, options.overrides)
    kind = hf.resolve_kind(config, preset["kind"] if preset else options.kind)
    asked = options.seq_len or (preset or {}).get("seq_len")
    own = hf.own_seq_len(config) if KINDS[kind].sequence == "tokens" else None
    seq_len = (asked or default_seq_len(kind, config, own)) if KINDS[kind].sequence != "none" else None
    model = hf.build_model(config, kind, options.precision.compute)
    if seq_len is not None and KINDS[kind].sequence == "tokens":
        hf.check_seq_len(model, config, seq_len)
    batch = draw_batch(fields_for(kind, model, seq_len, options.precision.compute), options.batch_size, "meta")
    loss = loss_of(kind, config.model_type)
    return Workload(
        model=model, example_batch=batch, global_batch=options.global_batch, precision=options.precision,
        loss=loss, model_inputs=named_entries(model, batch) if loss else None, batch_size=options.batch_size,
        tokens_per_sample=seq_len or 1, name=name if preset else config.model_type,
        spec=options.spec(spec, kind, seq_len), seed=options.seed,
    )  # fmt: skip


def _from_diffusers(spec: str, config: dict[str, Any], options: _Options) -> Workload:
    name, dtype = config["_class_name"], options.precision.compute
    model: Any = diffusion.build_model(config, options.overrides, dtype)
    default = diffusion.default_seq_len(config)
    seq_len = (options.seq_len or default) if default else None
    fields = diffusion.fields_for(name, model.config, seq_len, dtype, options.overrides)
    batch = draw_batch(fields, options.batch_size, "meta")
    return Workload(
        model=model, example_batch=batch, global_batch=options.global_batch, loss=denoising,
        model_inputs=named_entries(model, batch), precision=options.precision, batch_size=options.batch_size,
        tokens_per_sample=seq_len or 1, name=name,
        spec={**options.spec(spec, diffusion.KIND, seq_len), "class_name": name}, seed=options.seed,
    )  # fmt: skip


def _from_factory(spec: str, options: _Options, *, given: bool, batch_given: int | None) -> Workload:
    made = call_factory(spec)
    if isinstance(made, Workload):
        workload = made
        if batch_given is not None:
            workload = dataclasses.replace(workload, global_batch=batch_given)
    else:
        module, batch = made
        size = common_size(take_apart(batch)[0], {})
        dtype = next((p.dtype for p in module.parameters() if p.dtype.is_floating_point), torch.float32)
        workload = Workload(
            model=module, example_batch=batch, global_batch=batch_given or size, precision=_uniform(dtype),
            batch_size=size, name=spec.rpartition(":")[2], seed=options.seed,
        )  # fmt: skip
    if given:
        workload = with_precision(workload, options.precision)
    rebuilt = {
        "model": spec,
        "kind": "factory",
        "global_batch": workload.global_batch,
        "precision": _precision_names(workload.precision),
        "seed": options.seed,
    }
    return dataclasses.replace(workload, spec={**rebuilt, **workload.spec, "kind": "factory"}, seed=options.seed)


def _unknown_model(spec: str) -> ShardwrightError:
    name = spec.removeprefix("preset:")
    names = list(_presets())
    near = near_matches(name, names)
    return ShardwrightError(
        f"unknown model {spec!r}",
        means="near matches: "
        + (", ".join(f"preset:{n}" for n in near) if near else "none; shardwright models lists them"),
        change="MODEL",
        works=f"preset:{near[0] if near else 'llama-3-8b'}, hf:path/to/config.json, diffusers:path/to/config.json, "
        "or package.module:factory",
        exit_code=ExitCode.USAGE,
    )


def _optimizer(optimizer: str | OptimizerSpec) -> OptimizerSpec:
    if isinstance(optimizer, OptimizerSpec):
        return optimizer
    if optimizer.lower() not in _OPTIMIZERS:
        near = near_matches(optimizer.lower(), list(_OPTIMIZERS))
        raise ShardwrightError(
            f"unknown optimizer {optimizer!r}",
            means=f"known: {', '.join(_OPTIMIZERS)}",
            change="--optimizer",
            works=near[0] if near else "adamw",
        )
    name, state_tensors = _OPTIMIZERS[optimizer.lower()]
    factory: Callable[..., torch.optim.Optimizer] = getattr(torch.optim, name)
    return OptimizerSpec(name=name, factory=factory, state_tensors=state_tensors)


def _uniform(dtype: torch.dtype) -> Precision:
    low = dtype in (torch.bfloat16, torch.float16)
    wide = torch.float32 if low else dtype
    return Precision(compute=dtype, master=wide, grad_reduce=wide)


def _precision(precision: Precision | torch.dtype | str | None) -> Precision:
    if isinstance(precision, Precision):
        return precision
    return _uniform(torch.bfloat16 if precision is None else _dtype(precision))


def _dtype(value: torch.dtype | str) -> torch.dtype:
    if isinstance(value, torch.dtype):
        return value
    name = value.removeprefix("torch.")
    if name not in _DTYPES:
        raise ShardwrightError(
            f"unknown precision {value!r}", means=f"known: {', '.join(_DTYPES)}", change="--precision", works="bf16"
        )
    return _DTYPES[name]


_DTYPES_OF_PRECISION = ("compute", "master", "grad_reduce")


def _precision_names(precision: Precision) -> dict[str, Any]:
    names: dict[str, Any] = {
        name: str(getattr(precision, name)).removeprefix("torch.") for name in _DTYPES_OF_PRECISION
    }
    if precision.loss_scaling != LossScaling():
        rule = precision.loss_scaling
        names["loss_scaling"] = None if rule is None else dataclasses.asdict(rule)
    return names


def _named_precision(names: Mapping[str, Any]) -> Precision:
    rule = names.get("loss_scaling", {})
    scaling = None if rule is None else LossScaling(**rule)
    return Precision(**{name: _dtype(names[name]) for name in _DTYPES_OF_PRECISION}, loss_scaling=scaling)


def _cast(model: nn.Module, old: torch.dtype, new: torch.dtype) -> None:
    """Change floating-point parameters, and the buffers that have the parameters' dtype, to another dtype, ties kept.

    Under float64 every floating-point buffer is widened, and what is complex is complex128: nothing may round on the
    way. Under other types complex tensors stay as they are.
    """
    replaced: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                widens = tensor is not None and tensor.is_complex() and new == torch.float64
                if tensor is None or not (tensor.dtype.is_floating_point or widens):
                    continue
                is_buffer = table is module._buffers
                if is_buffer and tensor.dtype != old and new != torch.float64:
                    continue
                if id(tensor) not in replaced:
                    cast = tensor.detach().to(torch.complex128 if widens else new)
                    replaced[id(tensor)] = cast if is_buffer else nn.Parameter(cast, tensor.requires_grad)
                table[name] = replaced[id(tensor)]  # type: ignore[assignment]
        config = getattr(module, "config", None)
        if getattr(config, "dtype", None) == old:
            config.dtype = new  # type: ignore[union-attr]
