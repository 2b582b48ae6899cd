"""Questions whose one answer raises: `if (variance < 0).any(): raise ...`, `assert weights.all()`.

Such a check does not choose a path. It is taken to pass, whatever it asks of, and what it asks is verified as the
program runs.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import linecache
import sys
from types import CodeType, FrameType
from typing import Any
from unittest import mock

import torch

GAUSSIAN_NLL = torch.nn.functional.gaussian_nll_loss
_gaussian_nll_arguments = inspect.signature(GAUSSIAN_NLL)


def passing_answer() -> bool | None:
    """To the question that is being asked of a tensor, in an `if` that does nothing but raise, or in an `assert`; None
    where the line asks in another way."""
    frame = _asker()
    return None if frame is None else _passing(frame.f_code, frame.f_lineno, frame.f_lasti)


def _asker() -> FrameType | None:
    """The frame whose line makes a tensor a truth value: the nearest one outside the machinery of overrides."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and (
        frame.f_globals.get("__package__") == __package__ or frame.f_code.co_name in _MACHINERY
    ):
        frame = frame.f_back
    return frame


_MACHINERY = ("__torch_function__", "__bool__", "handle_torch_function", "wrapped")


@functools.lru_cache(maxsize=256)
def _passing(code: CodeType, line: int, instruction: int) -> bool | None:
    for node in ast.walk(_tree(code.co_filename)):
        test: Any = getattr(node, "test", None)
        if not isinstance(node, (ast.If, ast.Assert)) or not test.lineno <= line <= (test.end_lineno or test.lineno):
            continue
        if isinstance(node, ast.If) and (len(node.body) != 1 or not isinstance(node.body[0], ast.Raise) or node.orelse):
            return None
        answers = _answers(test, isinstance(node, ast.Assert))
        asked = _place(code, instruction)
        exact = [answer for part, answer in answers if asked == (part.lineno, part.col_offset)]
        return exact[0] if exact else answers[0][1] if len({answer for _, answer in answers}) == 1 else None
    return None


def _place(code: CodeType, instruction: int) -> tuple[int, int] | None:
    """(line, column) of what an instruction looks at, which Python knows from 3.11 on."""
    positions = getattr(code, "co_positions", None)
    found = next(itertools.islice(positions(), instruction // 2, None), None) if positions is not None else None
    return None if found is None else (found[0], found[2])


@functools.lru_cache(maxsize=8)
def _tree(file: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def _answers(test: ast.expr, passes: bool) -> list[tuple[ast.expr, bool]]:
    """(part, its answer) of a test that is to be `passes`: the whole answers as its parts, where all do so."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _answers(test.operand, not passes)
    if isinstance(test, ast.BoolOp):
        return [answer for part in test.values for answer in _answers(part, passes)]
    return [(test, passes)]


def gaussian_nll(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(the loss, does its check of variances pass). Torch's function asks where no mode is on that could answer, and
    clamps variances beside autograd."""
    given = _gaussian_nll_arguments.bind(*args, **kwargs)
    given.apply_defaults()
    variances, eps = given.arguments["var"], given.arguments["eps"]
    if not isinstance(variances, torch.Tensor):
        return GAUSSIAN_NLL(*args, **kwargs), None
    passes = ~torch.any(variances < 0)
    given.arguments["var"] = variances + (variances.clamp(min=eps) - variances).detach()
    with mock.patch.object(torch, "any", lambda *_: False), mock.patch.object(torch.Tensor, "clamp_", lambda x, **_: x):
        return GAUSSIAN_NLL(*given.args, **given.kwargs), passes
