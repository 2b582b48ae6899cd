"""Questions whose one answer raises: `if (variance < 0).any(): raise ...`, `assert weights.all()`.

Such a check does not choose a path. It is taken to pass, whatever it asks of, and that it passes is verified as the
program runs. Where each part must have one answer (`if a or b: raise`), each is verified when it is asked. Where one of
the parts is enough to pass (`if a and b: raise`, `if a < b < c: raise`), either may be so in a good batch: the whole
test is computed once more, without its shortcuts, and that is verified.
"""

from __future__ import annotations

import ast
import dis
import functools
import inspect
import linecache
import sys
from collections.abc import Mapping, Sequence
from types import CodeType, FrameType
from typing import Any, NamedTuple
from unittest import mock

import torch

GAUSSIAN_NLL = torch.nn.functional.gaussian_nll_loss
_gaussian_nll_arguments = inspect.signature(GAUSSIAN_NLL)


class Check(NamedTuple):
    """answer: to the question that is asked, as the check passes. test: what is to be `passes` as a whole, where that
    leaves the single parts open; None where each must have its answer."""

    answer: bool
    test: ast.expr | None
    passes: bool
    names: Mapping[str, Any]  # what the test reads

    def holds(self) -> torch.Tensor | None:
        """Does the whole test pass? None where it cannot be computed without its shortcuts."""
        if self.test is None:
            return None
        try:
            found = _computed(self.test, self.names)
        except Exception:  # of the user's own code, of which an earlier part may be the condition of a later one
            return None
        return found == self.passes if isinstance(found, torch.Tensor) else torch.tensor(found == self.passes)


def check_asked() -> Check | None:
    """The check whose tensor is being asked, in an `if` that does nothing but raise, or in an `assert`; None where the
    line asks in another way."""
    frame = _asker()
    found = None if frame is None else _check(frame.f_code, frame.f_lineno, frame.f_lasti)
    if frame is None or found is None:
        return None
    return Check(*found, {**frame.f_globals, **frame.f_locals} if found[1] is not None else {})


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
def _check(code: CodeType, line: int, instruction: int) -> tuple[bool, ast.expr | None, bool] | None:
    """(answer, test where its parts are open, what it is as it passes)."""
    asked = _asked(code, instruction)
    if asked is None:
        return None
    line = line if asked.place is None or asked.place[0] is None else asked.place[0]
    for node in ast.walk(_tree(code.co_filename)):
        test: Any = getattr(node, "test", None)
        if not isinstance(node, (ast.If, ast.Assert)) or not test.lineno <= line <= (test.end_lineno or test.lineno):
            continue
        if isinstance(node, ast.If) and (len(node.body) != 1 or not isinstance(node.body[0], ast.Raise) or node.orelse):
            return None
        passes = isinstance(node, ast.Assert)
        answer = _answer(_answers(test, passes), asked)
        return None if answer is None else (answer, test if _is_open(test, passes) else None, passes)
    return None


class _Asked(NamedTuple):
    """called: by a builtin such as bool, not by the branch itself. place: (line, column, last line, last column) of the
    expression that is asked, or of the call; None before Python 3.11."""

    called: bool
    place: tuple[int | None, ...] | None


_BETWEEN = ("STORE", "COPY", "TO_BOOL", "CACHE", "EXTENDED_ARG", "NOP", "DUP_TOP", "SWAP", "ROT")


def _asked(code: CodeType, instruction: int) -> _Asked | None:
    """What makes a tensor a truth value; None where it is neither a branch nor a call (`==` of lists does, too)."""
    before = [found for found in dis.get_instructions(code) if found.offset <= instruction]
    name = before[-1].opname if before else ""
    called = name.startswith(("CALL", "PRECALL"))
    if not called and "JUMP" not in name and name != "TO_BOOL":
        return None
    found = before[-1]
    if not called:  # the branch has the place of its statement; what was computed last, that of its expression
        found = next((i for i in before[-2::-1] if not i.opname.startswith(_BETWEEN)), found)
    positions = getattr(code, "co_positions", None)
    if positions is None:
        return _Asked(called, None)
    first, last, column, last_column = list(positions())[found.offset // 2]
    return _Asked(called, (first, column, last, last_column))


_BRANCHING = (ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _answer(answers: list[tuple[ast.expr, bool]], asked: _Asked) -> bool | None:
    """That of the part that is asked, or of all parts where nothing else on the line branches."""
    one_answer = len({answer for _, answer in answers}) == 1
    branches = any(isinstance(inner, _BRANCHING) for part, _ in answers for inner in ast.walk(part))
    if not asked.called and one_answer and not branches:
        return answers[0][1]
    for part, answer in answers:
        whole = part.value if isinstance(part, ast.NamedExpr) else part
        if asked.place == (whole.lineno, whole.col_offset, whole.end_lineno, whole.end_col_offset):
            return answer if not asked.called or _asks_each(whole, answer) else None
    return None


def _asks_each(call: ast.expr, answer: bool) -> bool:
    """Has each tensor that a builtin makes a truth value the answer of the whole?"""
    name = call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""
    return name == "bool" or (name, answer) in (("any", False), ("all", True))


@functools.lru_cache(maxsize=8)
def _tree(file: str) -> ast.Module:
    try:
        return ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return ast.Module(body=[], type_ignores=[])


def _answers(test: ast.expr, passes: bool) -> list[tuple[ast.expr, bool]]:
    """(part, its answer) of a test that is to be `passes`: a test is what all of its parts are."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _answers(test.operand, not passes)
    if isinstance(test, ast.BoolOp):
        return [answer for part in test.values for answer in _answers(part, passes)]
    return [(test, passes)]


def _is_open(test: ast.expr, passes: bool) -> bool:
    """May the test be `passes` though one of its parts is not?"""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _is_open(test.operand, not passes)
    if isinstance(test, ast.BoolOp):
        return isinstance(test.op, ast.Or) is passes or any(_is_open(part, passes) for part in test.values)
    return isinstance(test, ast.Compare) and len(test.ops) > 1 and not passes


def _computed(test: ast.expr, names: Mapping[str, Any]) -> Any:
    """The truth value of a test, a tensor where any part of it that decides is one."""
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        found = _computed(test.operand, names)
        return ~found if isinstance(found, torch.Tensor) else not found
    if isinstance(test, ast.BoolOp):
        return _combined(test.values, isinstance(test.op, ast.Or), names)
    if isinstance(test, ast.Compare) and len(test.ops) > 1:  # `a < b < c` is `a < b and b < c`
        sides = [test.left, *test.comparators]
        pairs = zip(sides, test.ops, sides[1:], strict=False)
        parts = [ast.copy_location(ast.Compare(a, [op], [b]), test) for a, op, b in pairs]
        return _combined(parts, False, names)
    if (
        isinstance(test, ast.Call)
        and isinstance(test.func, ast.Name)
        and test.func.id == "bool"
        and len(test.args) == 1
    ):
        return _computed(test.args[0], names)
    found = eval(compile(ast.Expression(test), "<a check of data>", "eval"), dict(names))
    if not isinstance(found, torch.Tensor):
        return bool(found)
    return found.reshape(()) != 0


def _combined(parts: Sequence[ast.expr], is_or: bool, names: Mapping[str, Any]) -> Any:
    whole: Any = not is_or
    for part in parts:
        found = _computed(part, names)
        if isinstance(found, bool):
            if found is is_or:  # decides, and what follows is not asked
                return found
        elif isinstance(whole, bool):
            whole = found
        else:
            whole = whole | found if is_or else whole & found
    return whole


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
