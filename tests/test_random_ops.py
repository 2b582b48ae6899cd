"""Every random op of torch is counter-based in the captured graph and in the reference, or is refused by its line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import random_models
import torch
from compared import assert_same_numbers, compared
from torch import nn
from torch.nn import functional as F

from shardwright import api, tasks
from shardwright.counter_random import CounterBasedRandom
from shardwright.errors import ShardwrightError
from shardwright.profiler.outside_random import refused_outside_random
from shardwright.profiler.workload import Workload

COUNT = 40_000
NEW = lambda: torch.empty(COUNT, dtype=torch.float64)  # noqa: E731
# what is drawn, and the share of it at or below some values, by the closed form
SHARES: dict[str, tuple[Callable[[], torch.Tensor], dict[float, float]]] = {
    "uniform_": (lambda: NEW().uniform_(-1, 3), {-1.0: 0.0, 0.0: 0.25, 2.0: 0.75, 3.0: 1.0}),
    "normal_": (lambda: NEW().normal_(1, 2), {-1.0: 0.15866, 1.0: 0.5, 3.0: 0.84134}),
    "normal": (lambda: torch.normal(torch.ones(COUNT), 2.0), {-1.0: 0.15866, 1.0: 0.5, 3.0: 0.84134}),
    "log_normal_": (lambda: NEW().log_normal_(0, 2), {1.0: 0.5, 7.389: 0.84134}),
    "exponential_": (lambda: NEW().exponential_(2), {0.0: 0.0, 0.5: 0.63212, 1.0: 0.86466}),
    "cauchy_": (lambda: NEW().cauchy_(1, 2), {-1.0: 0.25, 1.0: 0.5, 3.0: 0.75}),
    "geometric_": (lambda: NEW().geometric_(0.25), {0.0: 0.0, 1.0: 0.25, 2.0: 0.4375, 3.0: 0.578125}),
    "randint": (lambda: torch.randint(2, 6, (COUNT,)), {1.0: 0.0, 2.0: 0.25, 4.0: 0.75, 5.0: 1.0}),
    "random_": (lambda: torch.empty(COUNT, dtype=torch.uint8).random_(), {63.0: 0.25, 127.0: 0.5, 255.0: 1.0}),
    "bernoulli_": (lambda: NEW().bernoulli_(0.3), {0.0: 0.7, 1.0: 1.0}),
    "bernoulli": (lambda: torch.bernoulli(torch.full((COUNT,), 0.3)), {0.0: 0.7, 1.0: 1.0}),
    "dropout": (lambda: F.dropout(torch.ones(COUNT), 0.2), {0.0: 0.2, 1.24: 0.2, 1.25: 1.0}),
    "rrelu": (lambda: F.rrelu(-torch.ones(COUNT), 0.1, 0.5, True), {-0.5: 0.0, -0.4: 0.25, -0.2: 0.75, -0.1: 1.0}),
    "multinomial": (
        lambda: torch.multinomial(torch.tensor([[0.0, 1.0, 3.0]]).expand(COUNT, 3), 1),
        {0.0: 0.0, 1.0: 0.25, 2.0: 1.0},
    ),
    "multinomial with replacement": (
        lambda: torch.multinomial(torch.tensor([0.0, 1.0, 3.0]), COUNT, replacement=True),
        {0.0: 0.0, 1.0: 0.25, 2.0: 1.0},
    ),
    "multinomial without": (
        lambda: torch.multinomial(torch.tensor([[1.0, 1.0, 2.0]]).expand(COUNT, 3), 3)[:, 0],
        {0.0: 0.25, 1.0: 0.5, 2.0: 1.0},
    ),
}


@pytest.mark.parametrize("name", SHARES)
def test_the_counter_form_of_an_op_has_the_distribution_of_the_op(name: str) -> None:
    draw, shares = SHARES[name]
    with CounterBasedRandom(3, 1, 0):
        drawn, again = draw().double(), draw().double()
    own = draw().double()  # torch's own numbers: the same closed form holds for them
    for values in (drawn, again, own):
        for bound, share in shares.items():
            slack = 1e-6 if share in (0.0, 1.0) else 4 * (share * (1 - share) / COUNT) ** 0.5
            assert abs((values <= bound + 1e-9).double().mean().item() - share) <= slack, (bound, share)
    assert not torch.equal(drawn, again)
    assert drawn.shape == own.shape


def test_alpha_dropout_is_torchs_formula_with_the_kept_elements_of_dropout() -> None:
    x = torch.randn(6, 5, 4, dtype=torch.float64)
    for function, plain in ((F.alpha_dropout, F.dropout), (F.feature_alpha_dropout, F.dropout1d)):
        with CounterBasedRandom(0, 0, 0):
            found = function(x, 0.3, True)
        with CounterBasedRandom(0, 0, 0):
            kept = plain(torch.ones_like(x), 0.3, True) != 0
        a = ((1 - 0.3) * (1 + 0.3 * 1.7580993408473766**2)) ** -0.5
        expected = a * (torch.where(kept, x, -1.7580993408473766) + 1.7580993408473766 * 0.3)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_the_number_of_a_draw_follows_the_state_of_torchs_generator() -> None:
    """So that torch.utils.checkpoint, which sets the state back, draws the same again; and the state comes back."""
    before = torch.get_rng_state()
    with CounterBasedRandom(0, 0, 0):
        torch.rand(2)
        state = torch.get_rng_state()
        first, second = torch.rand(4), torch.rand(4)
        torch.set_rng_state(state)
        assert torch.equal(torch.rand(4), first) and torch.equal(torch.rand(4), second)
        assert not torch.equal(torch.rand(4), second)
    assert torch.equal(torch.get_rng_state(), before)


def _workload(name: str) -> Workload:
    spec = f"{Path(random_models.__file__)}:make_{name}"
    return tasks.check_workload({"model": spec, "kind": "factory", "global_batch": 4})


LAYOUTS = [
    ("dropouts", {"tp": "2", "recompute": "all"}),
    ("distributions", {"dp": "2", "zero": "3", "global_microbatch": "2"}),
    ("discrete", {"tp": "2"}),
    ("attention", {"tp": "2", "recompute": "all"}),
    ("attends", {"dp": "2", "zero": "1"}),
]


@pytest.mark.parametrize(("name", "force"), LAYOUTS, ids=str)
def test_a_model_that_draws_gives_the_numbers_of_the_reference(
    name: str, force: dict[str, str], tmp_path: Path
) -> None:
    plan = api.plan(_workload(name), "2xCPU", force={"pp": "1", "tp": "1", "dp": "1", **force})
    found = compared(plan, tmp_path)
    assert_same_numbers(found)
    assert found["losses"][0] != found["losses"][1]


@pytest.mark.parametrize("name", random_models.REFUSED)
def test_what_has_no_counter_form_is_refused_with_its_line(name: str) -> None:
    with pytest.raises(ShardwrightError) as caught:
        api.plan(_workload(name), "1xCPU")
    places = (f"{Path(random_models.__file__).name}:", "random_helper.py:", "_OF_NUMPY", "random_helper.OWN")
    assert any(place in caught.value.what for place in places), caught.value.what


def test_every_function_of_the_global_generators_is_refused_in_a_forward() -> None:
    import random

    import numpy as np

    states = ("getstate", "setstate", "get_state", "set_state")
    with refused_outside_random(nn.Linear(1, 1)):
        for owner, kind in ((random, random.Random), (np.random, np.random.RandomState)):
            names = [name for name in dir(owner) if hasattr(kind, name) and not name.startswith("_")]
            assert len(set(names)) > 20
            for name in {*names} - {*states}:
                with pytest.raises(ShardwrightError, match=name):
                    getattr(owner, name)()
    assert isinstance(random.gammavariate(1, 1), float) and isinstance(np.random.laplace(), float)


def test_numbers_that_python_draws_elsewhere_are_left_alone() -> None:
    import random

    original = random.random
    api.plan(_workload("attends"), "1xCPU")
    assert random.random is original and isinstance(random.random(), float)


def test_dropouts_under_inference_mode_differ_and_the_global_generator_is_left_as_it_was() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    x = torch.ones(64, dtype=torch.float64)
    with torch.inference_mode(), CounterBasedRandom(3, 1, 0) as random:
        first, second = F.dropout(x, 0.5), F.dropout(x, 0.5)
    assert not torch.equal(first, second) and random.count == 2
    assert torch.equal(torch.get_rng_state(), before)
    with CounterBasedRandom(3, 1, 0):
        assert torch.equal(F.dropout(x, 0.5), first)
