"""Names that a user of nn.Module may ask a decorated model for, and what there is instead."""

from __future__ import annotations

from torch import nn

from .errors import ShardwrightError

_SAVING = (
    "model.program.save(folder) and model.program.load(folder), or model.program.state_dict() and load_state_dict()"
)
_MODES = (
    "model.step(batch), which trains, and model.evaluate(batch), which computes as after eval(); neither needs a call"
)
_PLACES = "parallelize(hardware=...) and parallelize(precision=...): the plan says where and in what the model computes"
_INSTEAD = {
    "state_dict": _SAVING,
    "load_state_dict": _SAVING,
    "train": _MODES,
    "eval": _MODES,
    "training": _MODES,
    **dict.fromkeys(("to", "cuda", "cpu", "half", "bfloat16", "float", "double"), _PLACES),
    "zero_grad": "model.program.zero_grad()",
    "compile": "the decorated model as it is: it is compiled already",
}


class NotAModule(ShardwrightError, AttributeError):
    """So that hasattr() says no."""


def refusal(owner: str, name: str) -> AttributeError:
    """For an attribute that a Parallel lacks."""
    if name in _INSTEAD:
        return NotAModule(
            f"a decorated {owner} has no {name}: it is a planned program and no module",
            change=f"model.{name}",
            works=_INSTEAD[name],
        )
    more = f"; its module, model.module, has {name}" if hasattr(nn.Module, name) else ""
    return AttributeError(f"a decorated {owner} has no attribute {name!r}{more}")


def call_refusal(owner: str) -> ShardwrightError:
    return ShardwrightError(
        f"a decorated {owner} is not called: it is a planned program and no module",
        means="its parts are on the ranks, and a call would give no gradients",
        change="model(...)",
        works="model.step(batch) to train, model.evaluate(batch) for a loss, model.program.outputs(batch) for outputs",
    )
