"""The sharding solver against enumeration of every choice, and the one solver interface against known programs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.planner.sharding.solve import core, pbqp
from shardwright.planner.sharding.solve.pbqp import Problem, solve
from shardwright.planner.solver import Solution, solve_model

SCALES = (1.0, 1e-6, 1e5)  # microseconds to hours


@st.composite
def problems(draw: st.DrawFn, most_variables: int = 7, most_options: int = 4) -> Problem:
    """Random graphs from trees to complete ones; costs small integers, so that ties are common; some infinite."""
    scale = draw(st.sampled_from(SCALES))
    barred = draw(st.sampled_from((0.0, 0.1, 0.5)))
    count = draw(st.integers(1, most_variables))
    density = draw(st.sampled_from((0.2, 0.6, 1.0)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    signed = draw(st.booleans())

    def costs(*shape: int) -> np.ndarray:
        found = random.integers(-4 if signed else 0, 9, shape) * scale
        return np.where(random.random(shape) < barred, np.inf, found)

    problem = Problem()
    for _ in range(count):
        problem.add_variable(costs(random.integers(1, most_options + 1)))
    for u, v in itertools.combinations(range(count), 2):
        if random.random() < density:
            problem.add_edge(u, v, costs(len(problem.costs[u]), len(problem.costs[v])))
    return problem


def least(problem: Problem) -> float:
    choices = itertools.product(*(range(len(c)) for c in problem.costs))
    return min(problem.objective(list(choice)) for choice in choices)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_answer_is_the_least_of_all_choices(problem: Problem) -> None:
    best = least(problem)
    choice, solution = solve(problem)
    if math.isinf(best):
        assert solution.status == "infeasible" and math.isinf(solution.objective)
        return
    assert solution.status == "optimal"
    close = 1e-7 * max(np.abs(c[np.isfinite(c)]).max(initial=0.0) for c in (*problem.costs, *problem.edges.values()))
    assert problem.objective(choice) == pytest.approx(best, abs=close)
    assert solution.objective == problem.objective(choice)
    assert best - close <= solution.bound <= best + close


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_what_is_prepared_once_answers_at_every_price(problem: Problem, seed: int) -> None:
    random = np.random.default_rng(seed)
    scale = max((float(np.abs(c[np.isfinite(c)]).max(initial=0.0)) for c in problem.costs), default=0.0) or 1.0
    for u in random.permutation(len(problem.costs))[: random.integers(0, len(problem.costs) + 1)]:
        problem.add_weight(int(u), random.integers(0, 5, len(problem.costs[u])).astype(float))
    prepared = pbqp.prepare(problem)
    for price in (0.0, 0.3 * scale, 2.0 * scale):
        best = min(
            problem.objective(list(choice), price)
            for choice in itertools.product(*(range(len(c)) for c in problem.costs))
        )
        choice, solution = solve(problem, price=price, prepared=prepared)
        if math.isinf(best):
            assert solution.status == "infeasible"
        else:
            assert problem.objective(choice, price) == pytest.approx(best, abs=1e-7 * (scale + abs(best)))
            assert solution.objective == problem.objective(choice, price)


def dense(count: int, options: int, seed: int) -> Problem:
    """A complete graph with random costs: no reduction applies, so that the integer program has it all."""
    random = np.random.default_rng(seed)
    problem = Problem()
    for _ in range(count):
        problem.add_variable(random.random(options))
    for u, v in itertools.combinations(range(count), 2):
        problem.add_edge(u, v, random.random((options, options)))
    return problem


@pytest.mark.parametrize("seed", range(3))
def test_dense_core_reaches_the_integer_program(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, reached = dense(6, 3, seed), []
    original = pbqp.solve_core

    def spy(left, time_limit_s):
        reached.extend(left.costs)
        return original(left, time_limit_s)

    monkeypatch.setattr(core, "plan_order", lambda *_: None)
    monkeypatch.setattr(pbqp, "solve_core", spy)
    choice, solution = solve(problem)
    assert len(reached) >= 4
    assert problem.objective(choice) == pytest.approx(least(problem), rel=1e-7)
    assert solution.status == "optimal"


@pytest.mark.parametrize("seed", range(6))
def test_tables_over_several_variables_find_what_enumeration_finds(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pbqp, "solve_core", lambda *_: pytest.fail("reached the integer program"))
    problem = dense(4 + seed % 3, 4, seed)
    choice, solution = solve(problem)
    assert problem.objective(choice) == pytest.approx(least(problem), rel=1e-12)
    assert (solution.status, solution.gap_fraction) == ("optimal", 0.0)


def test_time_limit_gives_an_incumbent_and_a_true_bound() -> None:
    problem = dense(26, 8, 0)
    choice, solution = solve(problem, time_limit_s=4.0)
    assert solution.status == "feasible", "a time-out is not an optimum"
    assert math.isfinite(problem.objective(choice)) and solution.objective == problem.objective(choice)
    assert 0 <= solution.bound < solution.objective
    assert solution.gap_fraction == pytest.approx((solution.objective - solution.bound) / solution.objective)


@pytest.mark.parametrize("seed", range(5))
def test_an_answer_comes_where_the_solver_has_none_in_time(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = dense(7, 4, seed)
    monkeypatch.setattr(core, "plan_order", lambda *_: None)
    none = Solution("unknown", math.inf, -math.inf, math.inf, 0.0)
    monkeypatch.setattr(core, "solve_model", lambda *_, **__: none)
    choice, solution = solve(problem)
    assert solution.status == "feasible" and solution.objective == pytest.approx(problem.objective(choice))
    assert solution.bound <= least(problem) + 1e-9 <= solution.objective + 2e-9


def test_edges_between_the_same_two_variables_add_up() -> None:
    problem = Problem()
    u, v = problem.add_variable(np.zeros(2)), problem.add_variable(np.zeros(3))
    problem.add_edge(u, v, np.arange(6.0).reshape(2, 3))
    problem.add_edge(v, u, np.arange(6.0).reshape(3, 2))
    problem.add_edge(u, u, np.array([[0.0, 7.0], [7.0, 5.0]]))
    assert problem.objective([1, 2]) == 5 + 5 + 5
    assert problem.edges[(0, 1)].shape == (2, 3)


def test_of_equal_options_the_first_is_taken() -> None:
    """So that what nobody minds stays as the first strategy of each op says, which is whole."""
    problem = Problem()
    count = 6
    for _ in range(count):
        problem.add_variable(np.zeros(3))
    for u, v in itertools.combinations(range(count), 2):
        problem.add_edge(u, v, np.zeros((3, 3)))
    assert solve(problem)[0] == [0] * count


def test_long_chains_with_few_shared_values_need_no_integer_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pbqp, "solve_core", lambda *_: pytest.fail("reached the integer program"))
    random = np.random.default_rng(0)
    problem = Problem()
    for i in range(300):
        problem.add_variable(random.random(6))
        if i:
            problem.add_edge(i - 1, i, random.random((6, 6)))
        if i > 2 and i % 3 == 0:
            problem.add_edge(i - 2, i, random.random((6, 6)))
    choice, solution = solve(problem)
    assert solution.status == "optimal" and solution.gap_fraction == 0
    assert solution.objective == problem.objective(choice)


# --------------------------------------------------------------------------- the interface to solvers


def knapsack(count: int, seed: int = 0) -> pulp.LpProblem:
    random = np.random.default_rng(seed)
    model = pulp.LpProblem("knapsack", pulp.LpMinimize)
    take = [pulp.LpVariable(f"x{i}", cat=pulp.LpBinary) for i in range(count)]
    worth, weights = random.integers(10, 40, count), random.integers(10, 40, (3, count))
    model += pulp.lpSum(-int(w) * x for w, x in zip(worth, take, strict=True))
    for row in weights:
        model += pulp.lpSum(int(w) * x for w, x in zip(row, take, strict=True)) <= int(row.sum()) // 2
    return model


def test_optimum_has_its_own_value_as_bound() -> None:
    model = knapsack(12)
    solution = solve_model(model)
    exact = min(
        sum(c * b for c, b in zip(_coefficients(model), bits, strict=True))
        for bits in itertools.product((0, 1), repeat=12)
        if _feasible(model, bits)
    )
    assert solution.status == "optimal" and solution.objective == pytest.approx(exact)
    assert solution.bound <= exact + 1e-6 and solution.gap_fraction <= 1e-6


def _coefficients(model: pulp.LpProblem) -> list[float]:
    return [model.objective.get(variable, 0) for variable in model.variables()]


def _feasible(model: pulp.LpProblem, bits: tuple[int, ...]) -> bool:
    values = dict(zip(model.variables(), bits, strict=True))
    return all(sum(a * values[x] for x, a in c.items()) <= -c.constant for c in model.constraints.values())


def test_linear_program_is_bounded_by_its_value() -> None:
    model = pulp.LpProblem("line", pulp.LpMinimize)
    x, y = pulp.LpVariable("x", lowBound=0), pulp.LpVariable("y", lowBound=0)
    model += 2 * x + 3 * y
    model += x + y >= 4
    model += x <= 1
    solution = solve_model(model)
    assert (solution.status, solution.objective, solution.bound) == ("optimal", 11, 11)


def test_infeasible_program_says_so() -> None:
    model = pulp.LpProblem("none", pulp.LpMinimize)
    x = pulp.LpVariable("x", cat=pulp.LpBinary)
    model += x
    model += x >= 2
    solution = solve_model(model)
    assert solution.status == "infeasible" and math.isinf(solution.objective)


def test_time_limit_is_never_reported_as_an_optimum() -> None:
    solution = solve_model(knapsack(400, seed=3), time_limit_s=0.5, gap=0.0)
    assert solution.status in ("feasible", "unknown", "optimal")
    if solution.status == "feasible":
        assert solution.bound < solution.objective and solution.gap_fraction > 0
    if solution.status == "optimal":
        assert solution.objective - solution.bound <= 1e-6 * abs(solution.objective)
