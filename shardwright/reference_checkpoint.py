"""torch.utils.checkpoint in the reference: what is computed again runs under the modes that it first ran under.

Autograd runs its backward without torch function modes, such as the one that keeps casts in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from .profiler._torch import checkpoint_replaced, function_modes


@contextlib.contextmanager
def modes_kept_in_recomputation() -> Iterator[None]:
    def kept(fn: Callable[..., Any]) -> Callable[..., Any]:
        modes = function_modes()

        def run(*args: Any, **kwargs: Any) -> Any:
            with contextlib.ExitStack() as entered:
                for mode in () if function_modes() else modes:
                    entered.enter_context(mode)
                return fn(*args, **kwargs)

        return run

    def resumed(original: Any, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
        return original(kept(fn), *args, **kwargs)

    def reentrant(original: Any, fn: Callable[..., Any], *args: Any) -> Any:
        return original(kept(fn), *args)

    with checkpoint_replaced(resumed, reentrant):
        yield
