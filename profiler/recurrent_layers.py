"""nn.LSTM, nn.GRU and nn.RNN while a model is captured: each direction of each layer as one operator.

torch.export would write a recurrence out step by step, in a form that depends on the machine and the type at hand.
Inside `recurrent_layers` torch's functions make a matmul over all steps and shardwright::recurrence (recurrence_ops.py)
instead, samples first, whatever the layer's own order.

A packed sequence stays padded: it travels as an opaque _Padded with its lengths, from pack_padded_sequence through
layers to pad_packed_sequence. Its packed data has as many rows as the lengths add up to, which no plan can know: who
looks at it is refused, as is padding to the longest length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ..errors import ExitCode, ShardwrightError
from . import recurrence_ops
from .where import users_line


@contextlib.contextmanager
def recurrent_layers() -> Iterator[None]:
    replaced: dict[str, Callable[..., Any]] = {kind: _layers_of(kind) for kind in recurrence_ops.KINDS}
    replaced |= {"_pack_padded_sequence": _pack, "_pad_packed_sequence": _pad}
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            for owner in (torch, torch._VF):
                if hasattr(owner, name):
                    stack.callback(setattr, owner, name, getattr(owner, name))
                    setattr(owner, name, function)
        from torch.nn.modules import rnn

        held = getattr(rnn, "_rnn_impls", None)  # nn.RNN's own table of the two functions
        if isinstance(held, dict):
            stack.callback(held.update, dict(held))
            held.update({"RNN_TANH": replaced["rnn_tanh"], "RNN_RELU": replaced["rnn_relu"]})
        for layer, name in ((rnn.RNNBase, "get_expected_hidden_size"), (rnn.LSTM, "get_expected_cell_size")):
            stack.callback(setattr, layer, name, getattr(layer, name))
            setattr(layer, name, _with_symbols(getattr(layer, name)))
        yield


def _with_symbols(expected_size: Callable[..., Any]) -> Callable[..., Any]:
    """torch.nn takes the samples of a packed sequence for a Python number, which a trace with symbols does not have."""

    def expected(self: Any, input: Any, batch_sizes: Any) -> Any:
        if isinstance(batch_sizes, _BatchSizes):
            return expected_size(self, batch_sizes.of_samples(), None)
        return expected_size(self, input, batch_sizes)

    return expected


def _layers_of(kind: str) -> Callable[..., Any]:
    """torch.lstm and the like, in both of their forms: (input, state, ...) and (data, batch_sizes, state, ...)."""

    def function(input: Any, second: Any, *rest: Any) -> tuple[Any, ...]:
        if isinstance(input, _Padded):
            states, weights, has_bias, num_layers, dropout, training, bidirectional = rest
            _refuse_packed_dropout(dropout if training and num_layers > 1 else 0.0)
            settings = (has_bias, num_layers, 0.0, training, bidirectional)
            out, *last = _run(kind, input.padded, second_states(states), weights, settings, input.lengths)
            return (input.like(out), *last)
        if isinstance(second, torch.Tensor) and isinstance(rest[1], (list, tuple)):
            raise _packed("recurrent layers are given packed data that pack_padded_sequence did not make")
        weights, has_bias, num_layers, dropout, training, bidirectional, batch_first = rest
        x = input if batch_first else input.transpose(0, 1)
        settings = (has_bias, num_layers, dropout, training, bidirectional)
        out, *last = _run(kind, x, second_states(second), weights, settings, None)
        return (out if batch_first else out.transpose(0, 1), *last)

    def second_states(states: Any) -> Sequence[torch.Tensor]:
        return states if isinstance(states, (list, tuple)) else [states]

    return function


def _run(
    kind: str,
    x: torch.Tensor,
    states: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    settings: tuple[bool, int, float, bool, bool],
    lengths: torch.Tensor | None,
) -> list[torch.Tensor]:
    """x [B, T, I], states [L D, B, P] each. Returns [out, hidden, for LSTM cell]."""
    has_bias, num_layers, dropout, training, bidirectional = settings
    num_directions = 2 if bidirectional else 1
    per_run = len(weights) // (num_layers * num_directions)
    lasts: list[torch.Tensor] = []
    for layer in range(num_layers):
        outs = []
        for direction in range(num_directions):
            k = layer * num_directions + direction
            own = list(weights[k * per_run : (k + 1) * per_run])
            out, last = _direction(kind, x, [s[k] for s in states], own, has_bias, lengths, direction == 1)
            outs.append(out)
            lasts.append(last)
        x = torch.cat(outs, -1) if bidirectional else outs[0]
        if dropout > 0 and training and layer < num_layers - 1:
            x = torch.dropout(x.transpose(0, 1), dropout, True).transpose(0, 1)  # torch draws steps first
    last = torch.stack(lasts)
    if kind != "lstm":
        return [x, last]
    size = states[0].shape[-1]
    return [x, last[..., :size], last[..., size:]]


def _direction(
    kind: str,
    x: torch.Tensor,
    states: list[torch.Tensor],
    weights: list[torch.Tensor],
    has_bias: bool,
    lengths: torch.Tensor | None,
    reverse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """weights: of the input, of the hidden side, both biases, projection; the last three where the layer has them."""
    input_bias, hidden_bias = (weights[2], weights[3]) if has_bias else (None, None)
    rest = weights[4:] if has_bias else weights[2:]
    out, last, _ = torch.ops.shardwright.recurrence(
        F.linear(x, weights[0], input_bias), torch.cat(states, -1), weights[1], hidden_bias,
        rest[0] if rest else None, lengths, kind, reverse,
    )  # fmt: skip
    return out, last


# --------------------------------------------------------------------------- packed sequences


class _Padded:
    """Stands for the data of a PackedSequence, and for its batch sizes. Nothing but a recurrent layer may read it."""

    def __init__(self, padded: torch.Tensor, lengths: torch.Tensor) -> None:
        self.padded, self.lengths = padded, lengths  # [B, T, ...], [B]

    def like(self, padded: torch.Tensor) -> _Padded:
        return _Padded(padded, self.lengths)

    @property
    def dtype(self) -> torch.dtype:
        return self.padded.dtype

    @property
    def device(self) -> torch.device:
        return self.padded.device

    def dim(self) -> int:
        return self.padded.dim() - 1

    def size(self, dim: int) -> int:
        return self.padded.size(dim)

    def __getattr__(self, name: str) -> Any:
        raise _packed(f"a packed sequence's data is read ({name})")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _packed(f"a packed sequence's data is given to {getattr(func, '__name__', func)}")


def _unreadable(name: str) -> Callable[..., Any]:
    def method(self: _Padded, *_: Any) -> Any:
        raise _packed(f"a packed sequence's data is read ({name})")

    return method


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow", "radd", "rsub", "rmul", "rtruediv", "neg", "getitem",
              "len", "iter", "eq", "lt", "gt"):  # fmt: skip
    setattr(_Padded, f"__{_name}__", _unreadable(_name))


class _BatchSizes:
    device = torch.device("cpu")

    def __init__(self, padded: torch.Tensor) -> None:
        self.samples, self.steps = padded.shape[0], padded.shape[1]

    def __getitem__(self, step: int) -> int:
        if step != 0:
            raise _packed("a packed sequence's batch sizes are read")
        return self.samples

    def size(self, dim: int) -> int:
        return _Longest(self.steps)

    def of_samples(self) -> torch.Tensor:
        """As long in front as there are samples, whichever dimension counts them."""
        return torch.empty(self.samples, self.samples, device="meta")


class _Longest(int):
    """The longest length, taken for the number of steps; telling it from a total length that the user gives."""


def _pack(input: torch.Tensor, lengths: torch.Tensor, batch_first: bool) -> tuple[Any, Any]:
    padded = input if batch_first else input.transpose(0, 1)
    return _Padded(padded, lengths.to(padded.device)), _BatchSizes(padded)


def _pad(
    data: Any, batch_sizes: Any, batch_first: bool, padding_value: float, total_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(total_length, _Longest):
        raise _packed(
            "pad_packed_sequence pads to the longest length, which follows from the data",
            works="pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])",
        )
    padded, steps = data.padded, data.padded.shape[1]
    beyond = torch.arange(steps, device=padded.device) >= data.lengths.unsqueeze(1)
    if padding_value:
        padded = padded.masked_fill(beyond.reshape(*beyond.shape, *[1] * (padded.dim() - 2)), padding_value)
    if total_length > steps:
        size = [padded.shape[0], total_length - steps, *padded.shape[2:]]
        padded = torch.cat([padded, padded.new_full(size, padding_value)], 1)
    return padded if batch_first else padded.transpose(0, 1), data.lengths


def _refuse_packed_dropout(dropout: float) -> None:
    if dropout > 0:
        raise _packed(
            f"dropout {dropout} between recurrent layers drops elements of a packed sequence by their place in it",
            works="dropout=0, or padded input in place of a packed sequence",
        )


def _packed(
    what: str, works: str = "pad_packed_sequence(packed, total_length=x.shape[1]) before it"
) -> ShardwrightError:
    return ShardwrightError(
        f"{what} at {users_line()}",
        means="how many rows a packed sequence has depends on the lengths: what reads them has no shape to plan with",
        change="that line",
        works=works,
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )
