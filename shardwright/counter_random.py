"""Eager runs whose random numbers are those of the rewritten program: what the reference and the self-test run in.

The mode stands below autograd, where every op of torch comes by, those inside nn.LSTM, nn.MultiheadAttention or
scaled_dot_product_attention too. What draws there is replaced by its counter-based form, or refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import ExitCode, ShardwrightError
from .kernels.ops import make_key
from .profiler.random_forms import FORMS, Draw, base_name, bind, is_random, may_draw, writes_self

aten = torch.ops.aten


class CounterBasedRandom(TorchDispatchMode):
    """Inside, every random op is a function of (seed, step, microbatch) and of how many came before it.

    Its number is kept by the state of torch's own generator, which advances at every draw: torch.utils.checkpoint,
    which sets that state back before it runs a part again, so gets the same numbers again. Keep the mode on during
    backward() where the model uses it.
    """

    def __init__(self, seed: int, step: int, microbatch: int) -> None:
        super().__init__()
        self.key = make_key(seed, step, microbatch)
        self.count = 0
        self._numbers: dict[bytes, int] = {}
        self._depth = 0

    def __enter__(self) -> CounterBasedRandom:
        if self._depth == 0:  # _other enters it again, amid draws that must go on counting
            self._state = torch.get_rng_state()
        self._depth += 1
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._depth -= 1
        if self._depth == 0:
            torch.set_rng_state(self._state)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        arguments = bind(func, args, kwargs)
        name = base_name(func)
        if name == "rrelu_with_noise" and arguments["training"]:
            return self._rrelu(func, arguments)
        if name == "native_dropout" and arguments["train"]:
            return self._native_dropout(arguments)
        if name not in FORMS:
            return self._other(func, arguments, args, kwargs)
        if arguments.get("generator") is not None:
            raise _refused(func)
        result = FORMS[name](self._draw(), arguments)
        return args[0].copy_(result) if writes_self(func) else result

    def _other(self, func: Any, arguments: Any, args: Any, kwargs: Any) -> Any:
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # under inference_mode an op comes by whole, and what it draws within
                return func.decompose(*args, **kwargs)
        if may_draw(func, arguments):
            raise _refused(func)
        return func(*args, **kwargs)

    def _draw(self) -> Draw:
        state = torch.get_rng_state().numpy().tobytes()
        number = self._numbers.setdefault(state, self.count)
        self.count = max(self.count, number + 1)
        torch.default_generator.manual_seed(torch.initial_seed() + 1)  # another state, found again by the same way
        return Draw(self.key, number)

    def _rrelu(self, func: Any, a: Any) -> torch.Tensor:
        x = a["self"]
        u = self._draw().uniform(x.shape, x.dtype, x.device)
        slopes = torch.where(x <= 0, u * (a["upper"] - a["lower"]) + a["lower"], 1)
        a["noise"].copy_(slopes)
        return x.mul_(slopes) if writes_self(func) else x * slopes

    def _native_dropout(self, a: Any) -> tuple[torch.Tensor, torch.Tensor]:
        x, p = a["input"], a["p"]
        kept = self._draw().keep(x.shape, torch.bool, x.device, p)
        return x * kept * (1 / (1 - p)), kept


def _refused(func: Any) -> ShardwrightError:
    return ShardwrightError(
        f"random op {func} has no counter-based form",
        means="the model as written draws numbers that a rewritten program would not draw",
        change="that op of the model: draw with torch.rand, torch.randn, torch.randint, torch.bernoulli or dropout",
        works="torch.rand_like(x)",
        exit_code=ExitCode.UNSUPPORTED_MODEL,
    )
