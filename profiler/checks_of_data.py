"""Questions whose one answer raises: `if (variance < 0).any(): raise ...`, `assert weights.all()`.

Such a check does not choose a path. It is taken to pass, whatever it asks of, and that it passes is verified as the
program runs. Where each part must have one answer (`if a or b: raise`), each is verified when it is asked. Where one of
the parts is enough to pass (`if a and b: raise`, `if a < b < c: raise`), either may be so in a good batch: the whole
test is computed without its shortcuts, and that is verified. The part that is asked is taken as it is; the others are
computed once more, where that does nothing but give their values (pure_expressions.py).
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

from .pure_expressions import NotPure, computed, is_true

GAUSSIAN_NLL = torch.nn.functional.gaussian_nll_loss
_gaussian_nll_arguments = inspect.signature(GAUSSIAN_NLL)


class _Found(NamedTuple):
    """answer: to the question that is asked, as the check passes. test: what is to be `passes` as a whole, where that
    leaves the single parts open; None where each must have its answer. part: of the test, the one whose value is asked;
    None where that cannot be said for sure."""

    answer: bool
    test: ast.expr | None
    passes: bool
    part: ast.expr | None


class Check(NamedTuple):
    """A question in a check, as _Found, and what the test reads."""

    answer: bool
    test: ast.expr | None
    passes: bool
    part: ast.expr | None
    names: Mapping[str, Any]

    def holds(self, asked: torch.Tensor | None) -> torch.Tensor | None:
        """Does the whole test pass? None where it cannot be computed without its shortcuts, or might do more than that
        when computed once more. asked: the value of the part that is asked, where that is not to be computed again."""
        if self.test is None or (asked is not None and self.part is None):
            return None
        whole = _Whole(self.names, self.part, asked)
        try:
            found = whole.computed(self.test)
            whole.require_known_is_reached()
        except Exception:  # NotPure, or of an op, as an earlier part may be the condition of a later one
            return None
        return found == self.passes if isinstance(found, torch.Tensor) else torch.tensor(found == self.passes)


def check_asked() -> Check | None:
    """The check whose tensor is being asked, in an `if` that does nothing but raise, or in an `assert`; None where the
    line asks in another way."""
    frame = _asker()
    found = None if frame is None else _check(frame.f_code, frame.f_lineno, frame.f_lasti)
    if frame is None or found is None:
        return None
    return Check(*found, names={**frame.f_globals, **frame.f_locals} if found.test is not None else {})


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
def _check(code: CodeType, line: int, instruction: int) -> _Found | None:
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
        answers = _answers(test, passes)
        answer = _answer(answers, asked)
        if answer is None:
            return None
        part = next((part for part, _ in answers if _is_value(part, asked)), None)
        return _Found(answer, test if _is_open(test, passes) else None, passes, part)
    return None


class _Asked(NamedTuple):
    """called: by a builtin such as bool, not by the branch itself. compared: by a comparison, which asks for its branch
    (Python 3.13), and of lists for each two entries as well. decides: does a branch hang on the result of the call?
    place: (line, column, last line, last column) of the expression that is asked, or of the call; None before Python
    3.11."""

    called: bool
    compared: bool
    decides: bool
    place: tuple[int | None, ...] | None


_BETWEEN = ("STORE", "COPY", "TO_BOOL", "CACHE", "EXTENDED_ARG", "NOP", "DUP_TOP", "SWAP", "ROT")


def _asked(code: CodeType, instruction: int) -> _Asked | None:
    """What makes a tensor a truth value; None where it is neither a branch nor a call (`==` of lists does, too)."""
    instructions = list(dis.get_instructions(code))
    before = [found for found in instructions if found.offset <= instruction]
    name = before[-1].opname if before else ""
    called = name.startswith(("CALL", "PRECALL"))
    compared = name == "COMPARE_OP" and before[-1].argrepr.startswith("bool(")
    if not called and not compared and "JUMP" not in name and name != "TO_BOOL":
        return None
    found = before[-1]
    if (
        not called and not compared
    ):  # the branch has the place of its statement; what was computed last, that of its test
        found = next((i for i in before[-2::-1] if not i.opname.startswith(_BETWEEN)), found)
    after = next((i.opname for i in instructions[len(before) :] if not i.opname.startswith(_BETWEEN)), "")
    positions = getattr(code, "co_positions", None)
    if positions is None:
        return _Asked(called, compared, "JUMP" in after, None)
    first, last, column, last_column = list(positions())[found.offset // 2]
    return _Asked(called, compared, "JUMP" in after, (first, column, last, last_column))


_BRANCHING = (ast.IfExp, ast.BoolOp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


def _answer(answers: list[tuple[ast.expr, bool]], asked: _Asked) -> bool | None:
    """That of the part that is asked, or of all parts where nothing else on the line branches."""
    one_answer = len({answer for _, answer in answers}) == 1
    branches = any(isinstance(inner, _BRANCHING) for part, _ in answers for inner in ast.walk(part))
    if not asked.called and one_answer and not branches:
        return answers[0][1]
    if asked.place is None:
        part, answer = answers[0]
        single = asked.called and asked.decides and len(answers) == 1
        return answer if single and _asks_each(_unnamed(part), answer) else None
    for part, answer in answers:
        if _is_at(part, asked):
            return answer if not asked.called or _asks_each(_unnamed(part), answer) else None
    return None


def _unnamed(part: ast.expr) -> ast.expr:
    return part.value if isinstance(part, ast.NamedExpr) else part


def _is_at(part: ast.expr, asked: _Asked) -> bool:
    whole = _unnamed(part)
    return asked.place == (whole.lineno, whole.col_offset, whole.end_lineno, whole.end_col_offset)


def _is_value(part: ast.expr, asked: _Asked) -> bool:
    """Is the tensor that is asked the value of the part, or what bool(...) makes one of?"""
    whole = _unnamed(part)
    if asked.compared or not _is_at(part, asked) or (isinstance(whole, ast.Compare) and len(whole.ops) > 1):
        return False
    return not asked.called or (isinstance(whole, ast.Call) and _name(whole) == "bool")


def _name(call: ast.expr) -> str:
    return call.func.id if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) else ""


def _asks_each(call: ast.expr, answer: bool) -> bool:
    """Has each tensor that a builtin makes a truth value the answer of the whole?"""
    name = _name(call)
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


class _Whole:
    """A whole test, of which one part, if any, is known.

    The known part may have written to what the parts before it read. Those led to it, so that each that is a Python
    object left the test open, whatever it would be now; if one is a tensor, none of this is used.
    """

    def __init__(self, names: Mapping[str, Any], part: ast.expr | None, value: torch.Tensor | None) -> None:
        self._names, self._part, self._value = names, part, value
        self._is_reached = value is None

    def require_known_is_reached(self) -> None:
        if not self._is_reached:
            raise NotPure

    def computed(self, test: ast.expr) -> Any:
        """The truth value of a test, a tensor where any part of it that decides is one."""
        if test is self._part and self._value is not None:
            self._is_reached = True
            return self._value.reshape(()) != 0
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            found = self.computed(test.operand)
            return ~found if isinstance(found, torch.Tensor) else not found
        if isinstance(test, ast.BoolOp):
            return self._combined(test.values, isinstance(test.op, ast.Or))
        if isinstance(test, ast.Compare) and len(test.ops) > 1:  # `a < b < c` is `a < b and b < c`
            sides = [test.left, *test.comparators]
            pairs = zip(sides, test.ops, sides[1:], strict=False)
            return self._combined([ast.copy_location(ast.Compare(a, [op], [b]), test) for a, op, b in pairs], False)
        if isinstance(test, ast.Call) and _name(test) == "bool" and len(test.args) == 1 and "bool" not in self._names:
            return self.computed(test.args[0])
        found = computed(test, self._names)
        if not isinstance(found, torch.Tensor):
            return is_true(found)
        self.require_known_is_reached()
        return found.reshape(()) != 0

    def _combined(self, parts: Sequence[ast.expr], is_or: bool) -> Any:
        whole: Any = not is_or
        for part in parts:
            found = self.computed(part)
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
