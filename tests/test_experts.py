"""The expert axis: experts cut over a part of the data ranks, tokens sent to them, the numbers of one device."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from as_written import workload_of
from forked import fork_ranks
from torch import nn

import shardwright
from shardwright import api
from shardwright.costmodel.experts import DEVICE, Work, goes_by_hosts, in_turns_s, turns
from shardwright.costmodel.memory import StageState, StateBytes, state_memory
from shardwright.costmodel.model import CostModel
from shardwright.errors import ShardwrightError
from shardwright.evaluation import placed_anew
from shardwright.jobs import job_of
from shardwright.ops.strategy import Strategy
from shardwright.passes import expert_routes
from shardwright.planner.report.explain import explain as explain_graph
from shardwright.planner.sharding.expert_costs import copies_of_token, dispatch_s, row_bytes
from shardwright.planner.sharding.mesh import Axis, Mesh, Sizes
from shardwright.planner.sharding.sharder import Sharder
from shardwright.planner.space.candidates import enumerate_candidates
from shardwright.planner.space.choices import Choices
from shardwright.plans.axes import MeshShape, expert_axes, role_of
from shardwright.plans.document import Plan
from shardwright.profiler.gates import traced_gate
from shardwright.profiler.hardware import parse_hardware
from shardwright.profiler.workload import OptimizerSpec

pytestmark = pytest.mark.usefixtures("shared_captures")
WIDTH, INNER, EXPERTS, CHOICES = 8, 6, 4, 2
expert_mlp = torch.ops.shardwright.expert_mlp


def _clamped(both: torch.Tensor) -> torch.Tensor:
    gate, up = both[..., ::2].clamp(max=0.7), both[..., 1::2].clamp(min=-0.7, max=0.7)
    return (up + 1) * (gate * torch.sigmoid(1.7 * gate))


CLAMPED = traced_gate(_clamped, 2 * INNER, torch.float64)


class Experts(nn.Module):
    """kind: "uneven" has every token choose the first two experts, so that ranks without them get nothing; "biased" has
    biases and a gate without a name, in weights that lie the other way round."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / 3)
        if kind == "biased":
            self.gate_up = nn.Parameter(torch.randn(EXPERTS, WIDTH, 2 * INNER) / 3)
            self.gate_up_bias = nn.Parameter(torch.randn(EXPERTS, 2 * INNER))
            self.down_bias = nn.Parameter(torch.randn(EXPERTS, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = x.flatten(0, 1)
        scores = self.router(hidden)
        if self.kind == "uneven":
            scores = scores + torch.tensor([30.0, 20.0, -20.0, -20.0], dtype=x.dtype, device=x.device)
        weight, index = scores.softmax(-1).topk(CHOICES, dim=-1)
        if self.kind == "biased":
            experts = [self.gate_up.transpose(1, 2), self.down, self.gate_up_bias, self.down_bias]
            out, _ = expert_mlp.bias(hidden, index, weight, *experts, CLAMPED)
            return out.view_as(x)
        out, _ = expert_mlp(hidden, index, weight, self.gate_up, self.down, "silu")
        return out.view_as(x)


class Model(nn.Module):
    def __init__(self, kind: str = "even", layers: int = 2) -> None:
        super().__init__()
        self.table = nn.Embedding(16, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.blocks = nn.ModuleList(Experts(kind) for _ in range(layers))
        self.head = nn.Linear(WIDTH, 16)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x))
        return F.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())


@functools.cache
def _workload(kind: str = "even", layers: int = 2) -> tuple[Any, dict[str, torch.Tensor]]:
    """What is planned here is captured once, for the ranks too."""
    return _new_workload(kind, layers)


def _new_workload(kind: str, layers: int) -> tuple[Any, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    batch = {name: torch.randint(16, (8, 3)) for name in ("ids", "labels")}
    return workload_of(Model(kind, layers), batch), batch


def _step(rank: int, kind: str, layers: int, plan: str) -> Any:
    workload, batch = _workload(kind, layers)
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    loss = program.forward_backward(program.shard_batch(batch))
    return loss.item(), program.gradients(), {name: tuple(s.cuts) for name, s in program.store.specs.items()}


def _planned(kind: str, num_devices: int, force: dict[str, Any], layers: int = 2) -> Plan:
    workload, _ = _workload(kind, layers)
    return shardwright.plan(workload, f"{num_devices}xCPU", force=force, self_test=False)


def _assert_as_on_one_device(kind: str, plan: Plan, layers: int = 2, axis: str = "ep") -> None:
    results = fork_ranks(plan.mesh.num_devices, _step, kind, layers, plan.to_json())
    workload, batch = _new_workload(kind, layers)
    expected = workload.model(**batch)
    expected.backward()
    for loss, gradients, cuts in results:
        assert loss == pytest.approx(expected.item(), rel=1e-9)
        for name, parameter in workload.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)
        is_cut = {name for name, cut in cuts.items() if (axis, 0) in cut}
        of_experts = {name for name in cuts if name.split(".")[-1].startswith(("gate_up", "down"))}
        assert is_cut == of_experts if axis == "ep" else is_cut >= of_experts


def _rows_of(plan: Plan, start: str, axis: str = "ep") -> list[str]:
    at = plan.placement_axes.index(axis)
    return [row[at] for rows in plan.placements.values() for key, row in rows.items() if key.startswith(start)]


@pytest.mark.parametrize(("kind", "zero"), [("even", 0), ("even", 1), ("uneven", 3)])
def test_dispatched_tokens_give_the_numbers_of_one_device(kind: str, zero: int) -> None:
    plan = _planned(kind, 2, {"dp": 2, "ep": 2, "experts": "dispatch", "zero": zero})
    assert plan.mesh.dp == 2 and plan.mesh.ep == 2 and plan.mesh.num_devices == 2
    _assert_as_on_one_device(kind, plan)


@pytest.mark.parametrize(
    "force",
    [
        {"dp": 4, "ep": 4, "zero": 3},
        {"dp": 4, "ep": 2, "zero": 3, "zero_extent": "2/4"},
        {"dp": 2, "ep": 2, "tp": 2, "prefer": "memory"},
        {"dp": 2, "ep": 2, "cp": 2, "zero": 3},
        {"pp": 2, "dp": 2, "ep": 2, "microbatch": 2, "schedule": "zb_v", "zero": 1},
    ],
    ids=str,
)
def test_it_goes_with_the_other_axes(force: dict[str, Any]) -> None:
    plan = _planned("even", 4, {**force, "experts": "dispatch"}, layers=4 if "pp" in force else 1)
    assert plan.mesh.num_devices == 4 and plan.mesh.ep == force["ep"]
    _assert_as_on_one_device("even", plan, layers=4 if "pp" in force else 1)


@pytest.mark.parametrize("force", [{"dp": 2, "ep": 2, "zero": 3}, {"tp": 2, "prefer": "memory"}], ids=str)
def test_experts_with_biases_go_where_others_go(force: dict[str, Any]) -> None:
    """Their tokens are sent to them, or each rank leaves out the choices of others."""
    plan = _planned("biased", 2, force, layers=1)
    _assert_as_on_one_device("biased", plan, layers=1, axis="ep" if "ep" in force else "tp")


def _train(rank: int, plan: str, folder: str, load: bool, save: bool, steps: int, own_optimizer: bool = False) -> Any:
    """Losses of some steps, and the norm of the last gradient."""
    workload, batch = _workload("even", 1)
    workload = replace(workload, optimizer=OptimizerSpec("AdamW", torch.optim.AdamW, {"lr": 1e-2}, 2, 0.3))
    if load:
        with torch.no_grad():
            for parameter in workload.model.parameters():
                parameter.zero_()  # nothing may come from the model
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    if own_optimizer:
        program.optimizer = torch.optim.AdamW(program.parameters(), lr=1e-2)
    if load:
        program.load(folder)
    losses = [program.step(program.shard_batch(batch)).item() for _ in range(steps)]
    if save:
        program.save(folder)
        losses = [program.step(program.shard_batch(batch)).item() for _ in range(2)]
    return losses


LAYOUTS = [
    {"dp": 2, "ep": 2, "experts": "dispatch", "zero": 1},
    {"dp": 2, "zero": 3},
    {"tp": 2, "prefer": "memory"},
]


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=[str(layout) for layout in LAYOUTS])
def test_a_checkpoint_goes_on_under_another_layout(index: int, tmp_path: Path) -> None:
    plans = [_planned("even", 2, LAYOUTS[k % len(LAYOUTS)], layers=1).to_json() for k in (index, index + 1)]
    expected = fork_ranks(2, _train, plans[0], str(tmp_path / "c"), False, True, 2)[0]
    for losses in fork_ranks(2, _train, plans[1], str(tmp_path / "c"), True, False, 2):
        assert losses == pytest.approx(expected, rel=1e-9)


def test_the_users_own_optimizer_steps_experts_and_the_rest() -> None:
    plan = _planned("even", 2, LAYOUTS[0], layers=1).to_json()
    own, given = (fork_ranks(2, _train, plan, "", False, False, 3, flag)[0] for flag in (True, False))
    assert own == pytest.approx(given, rel=1e-9)


def test_widths_of_the_expert_axis_are_tried_for_models_with_experts_alone() -> None:
    def widths(num_experts: int) -> set[int]:
        found = enumerate_candidates(Choices(), 8, 8, 4, max_tensor=8, num_experts=num_experts)
        return {candidate.mesh.expert_ranks for candidate in found}

    assert widths(0) == {1} and widths(4) == {1, 2, 4} and widths(6) == {1, 2} and widths(64) == {1, 2, 4, 8}


@pytest.mark.parametrize(
    ("force", "match", "works"),
    [
        ({"dp": 4, "ep": 8}, "ep=8, and a layer of the model has 4 experts", "--force ep=4"),
        ({"dp": 2, "ep": 4}, "ep=4 does not divide dp=2", "--force ep=2"),
        ({"tp": 4, "ep": 2}, "ep=2", "--force ep=1"),
        ({"experts": "gather"}, "no experts are split", "--force ep=2"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_with_what_works(force: dict[str, Any], match: str, works: str) -> None:
    with pytest.raises(ShardwrightError, match=match) as caught:
        _planned("even", 4, force)
    assert caught.value.exit_code == 4 and caught.value.works == works


@pytest.mark.parametrize("kind", ["even", "uneven", "biased"])
def test_tokens_that_go_by_hosts_give_the_numbers_of_one_device(kind: str) -> None:
    """Of four ranks on two hosts."""
    plan = _planned(kind, 4, {"dp": 4, "ep": 4, "zero": 1}, layers=1)
    assert plan.expert_ranks_per_host == 1  # one machine
    update = {"expert_ranks_per_host": 2, "expert_chunks": 1 if kind == "even" else 2}
    _assert_as_on_one_device(kind, plan.model_copy(update=update), layers=1)


@pytest.mark.parametrize(("kind", "chunks"), [("even", 2), ("uneven", 4), ("biased", 3)])
def test_tokens_that_go_in_chunks_give_the_numbers_of_one_device(kind: str, chunks: int) -> None:
    plan = _planned(kind, 2, {"dp": 2, "ep": 2, "experts": "dispatch"}, layers=1)
    assert plan.expert_chunks == 1  # on CPUs nothing passes beside products
    _assert_as_on_one_device(kind, plan.model_copy(update={"expert_chunks": chunks}), layers=1)


def _sending_again(plan: Plan) -> Plan:
    """The same plan, whose backwards send tokens again."""
    found = [(name, key) for name, rows in plan.placements.items() for key in rows if key.startswith("expert_mlp")]
    again = {name: (f"{key}.2>kept",) for name, key in found if key == "expert_mlp"}
    policy = plan.memory_policy.model_copy(update={"recompute": again, "instances": {}})
    return plan.model_copy(update={"memory_policy": policy})


def test_tokens_that_are_sent_again_give_the_numbers_of_one_device() -> None:
    plan = _planned("uneven", 2, {"dp": 2, "ep": 2, "experts": "dispatch"}, layers=1)
    _assert_as_on_one_device("uneven", _sending_again(plan).model_copy(update={"expert_chunks": 2}), layers=1)


def test_what_came_to_experts_stays_where_memory_allows_and_is_sent_again_where_not() -> None:
    """As bytes of the plan's own choices: less is kept where tokens are sent again, which takes their messages."""
    graph, cluster = api.capture_of(_planned("even", 2, LAYOUTS[0], layers=1), _workload("even", 1)[0]), "2xH100-80GB"
    sharder = Sharder(graph, CostModel(parse_hardware(cluster)), job=job_of(_workload("even", 1)[0], 8, {}))
    solution = sharder.solve(MeshShape.of({"dp": 2, "ep": 2}), 4)
    costs = [c for c in solution.costs.values() if any("expert_mlp.2>kept" in p.recomputed for p in c.recompute_points)]
    assert costs
    for cost in costs:
        point = min(
            (p for p in cost.recompute_points if "expert_mlp.2>kept" in p.recomputed), key=lambda p: len(p.recomputed)
        )
        assert point.forward_comm_s > 0 and point.saved_bytes < cost.saved_bytes


def test_by_hosts_a_token_crosses_to_each_once() -> None:
    """Experts of ranks 1 and 3, each on a host of two: rank 0 sends a token that chose both once to its own host, and
    once to the other one; each sends it on to the one that has the expert."""
    for rank, hosts, inside in ((0, [True, True], [False, True]), (3, [True, True], [False, True])):
        place = expert_routes.Place([0, 1, 2, 3], [1, 1, 1, 1], rank, 2)
        chosen = place.chosen(torch.tensor([[1, 3]]))
        assert place.to_hosts(chosen)[:, 0].tolist() == hosts
        assert place.in_host(chosen)[:, 0].tolist() == inside


def test_tokens_go_by_hosts_where_that_sends_fewer_rows_between_them() -> None:
    """Of 16 ranks on two hosts, 8 choices fall on 6.5 ranks, and on both hosts; one choice falls on one of either."""
    assert goes_by_hosts(8, 16, 8) and not goes_by_hosts(1, 16, 8)
    assert not goes_by_hosts(8, 16, 1) and not goes_by_hosts(8, 8, 8)  # hosts of one rank; one host
    plans = [
        shardwright.plan(_workload("even", 1)[0], hardware, force={"dp": 4, "ep": 4}, self_test=False)
        for hardware in ("2x2xH100-80GB", "1x4xH100-80GB")
    ]
    assert [plan.expert_ranks_per_host for plan in plans] == [1, 1]  # two choices: 1.75 ranks, 1.5 hosts


def test_two_hops_are_priced_by_the_rows_of_each() -> None:
    """Of 16 ranks on two hosts, 10 tokens each with 8 choices: rows whole over the ranks that send to each other."""
    sent: list[tuple[str, float]] = []

    def link(name: str) -> Callable[[str, float], float]:
        return lambda kind, num_bytes: sent.append((name, num_bytes)) or 0.0

    (role,) = (role_of(name) for name in expert_axes())
    hops = (2, 2, link("across")), (16, 8, link("inside"))
    axis = Axis("ep", 16, link("counts"), role, hops)
    mesh = Mesh((axis,), 1, 160, lambda *_: 0.0, lambda num_bytes: 0.0)
    hidden, index, weight = (Sizes((160, n), (), 160.0 * n * size, True) for n, size in ((32, 2), (8, 8), (8, 2)))
    dispatched = Strategy((0,) * 5, (0, 0), lowering="dispatch_experts", of_experts=True)
    dispatch_s(mesh, [dispatched], [hidden, index, weight, *[Sizes((16, 1, 1), (), 0.0, True)] * 2], 0.0)
    there, back = 32 * 2 + 8 * 4 + 8 * 2, 32 * 2
    across, inside = 2 * 10 * copies_of_token(8, 2), 8 * 10 * copies_of_token(8, 16)
    expected = [("across", across * there), ("across", across * back), ("inside", inside * there)]
    expected += [("inside", inside * back)]
    found = [one for one in sent if one[0] != "counts"]
    assert [name for name, _ in found] == [name for name, _ in expected]
    assert [size for _, size in found] == pytest.approx([size for _, size in expected])
    assert len(sent) == 5  # counts of both hops are exchanged at once


def test_messages_of_a_chunk_pass_beside_products_of_others() -> None:
    """There 2, products 3, back 2: of two chunks the second one's way there and the first one's way back are hidden."""
    chunk = [Work("link", 2.0), Work(DEVICE, 3.0), Work("link", 2.0)]
    assert in_turns_s(chunk, 1) == 7.0
    assert in_turns_s(chunk, 2) == 2 + 3 + 3 + 2
    beside = [Work("link", 2.0), Work(DEVICE, 1.5), Work("link", 2.0), Work(DEVICE, 1.5, False)]
    assert in_turns_s(beside, 1) == 5.5  # what nobody waits for passes beside the way back
    hops = [Work("hop 0", 2.0), Work("hop 1", 2.0), Work(DEVICE, 1.0)]
    assert list(turns(2, 2)) == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert in_turns_s(hops, 3) == 3 * 2 + 2 + 1  # one chunk's second hop beside the next one's first


def test_links_that_take_as_long_as_products_have_tokens_go_in_chunks() -> None:
    """Of wide experts over a network; not of small ones inside a host, whose messages are mostly latency."""
    small = shardwright.plan(_workload("even", 1)[0], "1x4xH100-80GB", force={"dp": 4, "ep": 4}, self_test=False)
    assert small.expert_chunks == 1


def test_a_token_goes_once_to_each_rank_that_it_needs() -> None:
    assert copies_of_token(8, 1) == 1 and copies_of_token(1, 16) == pytest.approx(1)
    assert copies_of_token(8, 2) == pytest.approx(2 - 2**-7) and copies_of_token(8, 16) == pytest.approx(
        6.4525, abs=1e-4
    )
    assert copies_of_token(8, 8, parts=2) == pytest.approx(8 * (1 - (15 / 16) ** 8))


def _short_step(rank: int, plan: str) -> Any:
    workload, batch = _workload("even", 1)
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    short = {name: tensor[:7] for name, tensor in batch.items()}
    evaluated = program.evaluate(program.shard_batch(short)).item()
    return evaluated, program.forward_backward(program.shard_batch(short)).item(), program.gradients()


@pytest.mark.parametrize("form", ["dispatch", "gather"])
def test_a_plan_is_taken_apart_and_placed_anew_in_the_form_that_was_forced(form: str) -> None:
    plan = _planned("even", 2, {"dp": 2, "ep": 2, "experts": form}, layers=1)
    workload, _ = _workload("even", 1)
    graph = api.capture_of(plan, workload)
    sharder = Sharder(graph, CostModel(parse_hardware("2xCPU")), job=job_of(workload, 8, plan.forced))
    moved = [row for row in explain_graph(plan, graph, sharder).rows if "expert_mlp" in row.op]
    assert moved and all(("dispatch" in row.placements["ep"]) is (form == "dispatch") for row in moved)
    on_ep = plan.placement_axes.index("ep")
    placed = placed_anew(plan, graph, {}, plan.microbatch.size).placements
    for name, rows in plan.placements.items():
        for key in rows:
            if "expert_mlp" in key:
                assert placed[name][key][on_ep] == rows[key][on_ep]


@pytest.mark.parametrize("form", ["dispatch", "gather"])
def test_samples_that_do_not_divide_are_counted_once(form: str) -> None:
    """The last one is run whole by every rank, which has some of the experts or, where they are gathered, all."""
    plan = _planned("even", 2, {"dp": 2, "ep": 2, "experts": form}, layers=1)
    workload, batch = _new_workload("even", 1)
    expected = workload.model(**{name: tensor[:7] for name, tensor in batch.items()})
    expected.backward()
    for evaluated, loss, gradients in fork_ranks(2, _short_step, plan.to_json()):
        assert [evaluated, loss] == pytest.approx([expected.item()] * 2, rel=1e-9)
        for name, parameter in workload.model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-9, atol=1e-12)


def _bytes_sent(rank: int, kind: str, plan: str) -> list[int]:
    """Of each message of rows in a step, without the counts before it."""
    workload, batch = _workload(kind, 1)
    program = shardwright.build(Plan.model_validate_json(plan), workload, self_test=False)
    found: list[int] = []
    whole = expert_routes.dist

    def counted(out: torch.Tensor, given: torch.Tensor, *sizes: Any, **options: Any) -> Any:
        if sizes:
            found.append(given.nbytes)
        return whole.all_to_all_single(out, given, *sizes, **options)

    expert_routes.dist = SimpleNamespace(all_to_all_single=counted)  # type: ignore[assignment]
    try:
        program.forward_backward(program.shard_batch(batch))
    finally:
        expert_routes.dist = whole
    return found


@pytest.mark.parametrize("again", [False, True])
def test_what_is_sent_is_what_it_is_priced_at(again: bool) -> None:
    """Where all tokens choose experts of one rank, each goes to one; that rank alone sends results."""
    plan = _planned("uneven", 2, {"dp": 2, "ep": 2, "experts": "dispatch"}, layers=1)
    if again:
        plan = _sending_again(plan)
    of_ranks = fork_ranks(2, _bytes_sent, "uneven", plan.to_json())
    messages = [sum(pair) for pair in zip(*of_ranks, strict=True)]
    assert of_ranks[1][1] == of_ranks[1][3] == 0  # whose experts nobody chose
    tokens = 8 * 3
    hidden, index, weight = ((tokens, n) for n in (WIDTH, CHOICES, CHOICES))
    operands = [Sizes(shape, (), 8.0 * math.prod(shape), True) for shape in (hidden, hidden, index, weight)]
    experts = [Sizes((1,), (), 0.0, True)]
    forward, backward = row_bytes([*operands[1:], *experts * 2]), row_bytes([*operands, *experts * 3], again=again)
    assert messages == [tokens * each for each in (*forward, *backward)]


@pytest.mark.parametrize("num_tokens", [0, 1, 2])
@pytest.mark.parametrize("choices", [1, 2, 3])
def test_any_number_of_rows_comes_as_it_was_sent(
    choices: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four bytes of each choice lie before its weight, which takes eight: of one row and of none as of more."""
    done = SimpleNamespace(wait=lambda: None)
    alone = SimpleNamespace(all_to_all_single=lambda out, given, *_, **__: out.copy_(given) is None or done)
    monkeypatch.setattr(expert_routes, "dist", alone)
    leg = expert_routes.Leg([num_tokens], [num_tokens], None)
    index = torch.randint(EXPERTS, (num_tokens, choices), dtype=torch.int32)
    sent = [torch.randn(num_tokens, WIDTH).bfloat16(), index, torch.randn(num_tokens, choices, dtype=torch.float64)]
    sent += [torch.randn(num_tokens, WIDTH, dtype=torch.float64), torch.randn(choices, num_tokens).t()]
    for columns in (sent, sent[1:], sent[4:]):
        for back in (False, True):
            (came,) = expert_routes.in_turns([expert_routes.exchange(leg, columns, back=back)])
            assert all(torch.equal(here, there) for here, there in zip(came, columns, strict=True))


def test_state_of_experts_is_split_over_the_ranks_that_hold_the_same() -> None:
    """Of 8 data ranks in 4 parts: a fourth of the experts each, on two ranks, which split its state."""
    kinds, whole, experts = StateBytes(2, 4, 4, 2, False), 800, 3200  # the rest, and all experts
    here = StageState(whole + experts // 4, whole + experts // 4, 0, 0, expert_elements=experts // 4, expert_ranks=4)
    for zero, parameters in ((1, 1), (3, 8)):
        held = state_memory(here, kinds, 8, zero, 1, "cuda")
        assert held.optimizer == (whole + experts) // 8 * kinds.of_master
        assert held.parameters == (whole + experts // 4 if parameters == 1 else (whole + experts) // 8) * kinds.compute
