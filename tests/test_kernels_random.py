"""The counter-based generator: known answers, and the same numbers however a tensor is cut."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from shardwright.errors import ShardwrightError
from shardwright.kernels import generator
from shardwright.kernels.ops import bernoulli, dropout, make_key, rand_normal, rand_uniform
from shardwright.kernels.philox import philox4x32

CPU = torch.device("cpu")
ONES = 2**32 - 1
# Random123's known-answer vectors for philox4x32 with 10 rounds: counter, key, output
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter,key,expected", KNOWN)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    assert philox4x32(counter, key) == expected
    as_tensors = philox4x32([torch.tensor([c]) for c in counter], [torch.tensor([k]) for k in key])
    assert tuple(int(word) for word in as_tensors) == expected
    mixed = philox4x32([torch.tensor([counter[0]]), *counter[1:]], key)
    assert tuple(int(word) for word in mixed) == expected


def words_by_hand(key, index, numel, rng_index, stream=0):
    """The definition, one element at a time, in Python integers."""
    seed, step, microbatch, base = key.tolist()
    element = microbatch * numel + index
    block, word = divmod(element, 4)
    counter = (block % 2**32, block // 2**32, base + rng_index + stream * 2**31, step)
    return philox4x32(counter, (seed % 2**32, seed // 2**32 % 2**32))[word]


KEYS = [
    make_key(0),
    make_key(-3, 7, 2, 11),
    make_key(2**64 - 1, 2**31 + 5, 3, 100),
    make_key(12345678901234, 1, 2**33 // 6 + 1, 0),  # element indices that need more than 34 bits
]


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("shape", [(6,), (2, 3), (5, 7), (2, 3, 5), (4, 8)])
def test_uniform_is_the_leading_bits_of_the_elements_words(key, shape):
    numel = math.prod(shape)
    leading = torch.tensor([words_by_hand(key, i, numel, 5) for i in range(numel)]).view(shape)
    trailing = torch.tensor([words_by_hand(key, i, numel, 5, stream=1) for i in range(numel)]).view(shape)
    zeros = [0] * len(shape)
    for dtype, bits in ((torch.float32, 24), (torch.float16, 11), (torch.bfloat16, 8)):
        got = rand_uniform(key, shape, shape, zeros, 5, dtype, CPU)
        assert got.dtype == dtype and torch.equal(got.double(), (leading >> (32 - bits)).double() * 2.0**-bits)
    got = rand_uniform(key, shape, shape, zeros, 5, torch.float64, CPU)
    assert torch.equal(got, ((leading << 21) + (trailing >> 11)).double() * 2.0**-53)
    kept = dropout(torch.ones(shape), key, 0.3, 5, shape, zeros)
    assert torch.equal(kept != 0, leading >= round(0.3 * 2**32))


@st.composite
def boxes(draw):
    shape = draw(st.lists(st.integers(1, 6), min_size=1, max_size=5))
    offset = [draw(st.integers(0, size - 1)) for size in shape]
    local = [draw(st.integers(1, size - o)) for size, o in zip(shape, offset, strict=True)]
    return shape, local, offset, draw(st.integers(0, 5))


@settings(deadline=None, max_examples=150)
@given(boxes(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_any_shard_is_the_slice_of_the_whole(box, dtype):
    shape, local, offset, microbatch = box
    key, zeros = make_key(99, 4, microbatch, 2), [0] * len(shape)
    cut = tuple(slice(o, o + size) for o, size in zip(offset, local, strict=True))
    for op in (rand_uniform, rand_normal):
        whole = op(key, shape, shape, zeros, 1, dtype, CPU)
        assert torch.equal(op(key, local, shape, offset, 1, dtype, CPU), whole[cut])
    x = torch.arange(1, 1 + math.prod(shape), dtype=torch.float64).view(shape).to(dtype)
    assert torch.equal(dropout(x[cut], key, 0.4, 1, shape, offset), dropout(x, key, 0.4, 1, shape, zeros)[cut])
    probs = (x / x.max()).to(dtype)
    assert torch.equal(bernoulli(probs[cut], key, 1, shape, offset), bernoulli(probs, key, 1, shape, zeros)[cut])


@pytest.mark.parametrize("chunk", [1, 3, 16])
@pytest.mark.parametrize("local,offset", [((8, 12), (0, 0)), ((3, 12), (2, 0)), ((8, 5), (0, 3)), ((8, 4), (0, 8))])
def test_working_in_chunks_changes_nothing(monkeypatch, chunk, local, offset):
    want = rand_uniform(make_key(1), local, (8, 12), offset, 0, torch.float32, CPU)
    monkeypatch.setattr(generator, "_CHUNK_BLOCKS", chunk)
    assert torch.equal(rand_uniform(make_key(1), local, (8, 12), offset, 0, torch.float32, CPU), want)


def test_microbatches_steps_operators_and_seeds_differ():
    def draw(*words, index=0):
        return rand_uniform(make_key(*words), (64,), (64,), (0,), index, torch.float64, CPU)

    draws = [draw(0), draw(1), draw(0, 1), draw(0, 0, 1), draw(0, 0, 0, 1), draw(0, index=2)]
    for i, a in enumerate(draws):
        for b in draws[:i]:
            assert not torch.isclose(a, b).any()
    assert torch.equal(draw(0, 0, 0, 2, index=3), draw(0, 0, 0, 0, index=5))  # only the sum of base and index counts
    # microbatches are consecutive stretches of one tensor
    assert torch.equal(
        torch.cat([draw(0), draw(0, 0, 1)]), rand_uniform(make_key(0), (128,), (128,), (0,), 0, torch.float64, CPU)
    )


def test_moments_and_independence_of_neighbours():
    shape, n = (512, 512), 512 * 512
    u = rand_uniform(make_key(3), shape, shape, (0, 0), 0, torch.float64, CPU).flatten()
    z = rand_normal(make_key(3), shape, shape, (0, 0), 0, torch.float64, CPU).flatten()
    assert 0 <= u.min() and u.max() < 1
    sigma = 5 / math.sqrt(n)
    assert abs(u.mean() - 0.5) < sigma * math.sqrt(1 / 12) and abs(u.var() - 1 / 12) < sigma * math.sqrt(1 / 180)
    assert (
        abs(z.mean()) < sigma
        and abs(z.var() - 1) < sigma * math.sqrt(2)
        and abs((z**4).mean() - 3) < sigma * math.sqrt(96)
    )
    for lag in (1, 2, 3, 4, 512):
        assert abs((z[lag:] * z[:-lag]).mean()) < sigma
    counts = torch.histc(u, 256, 0, 1)
    assert abs(((counts - n / 256) ** 2).sum() / (n / 256) - 255) < 5 * math.sqrt(2 * 255)  # chi-squared


def test_float32_numbers_are_the_float64_ones_cut_short():
    wide, narrow = (rand_uniform(make_key(8), (999,), (999,), (0,), 0, d, CPU) for d in (torch.float64, torch.float32))
    assert torch.equal((wide * 2**24).floor(), narrow.double() * 2**24)
    wide, narrow = (rand_normal(make_key(8), (999,), (999,), (0,), 0, d, CPU) for d in (torch.float64, torch.float32))
    torch.testing.assert_close(narrow.double(), wide, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
def test_dropout_scales_what_it_keeps_and_its_gradient_is_itself(p):
    x = torch.randn(33, 7, dtype=torch.float64, requires_grad=True)
    key, grad = make_key(4, 1), torch.randn(33, 7, dtype=torch.float64)
    out = dropout(x, key, p, 2, x.shape, (0, 0))
    kept = out != 0
    assert abs(kept.double().mean() - (1 - p)) < 0.15
    torch.testing.assert_close(out[kept], x[kept] / (1 - p) if p < 1 else x[kept], rtol=1e-15, atol=0)
    (got,) = torch.autograd.grad(out, x, grad)
    assert torch.equal(got, dropout(grad, key, p, 2, x.shape, (0, 0)))


def test_dropout_traces_to_one_node_each_way_and_compiles():
    x, key = torch.randn(4, 6, dtype=torch.float64, requires_grad=True), make_key(4)

    def step(x, key):
        out = dropout(x.t(), key, 0.5, 0, (6, 4), (0, 0)) ** 2
        return torch.autograd.grad(out.sum(), x)[0]

    graph = make_fx(step, tracing_mode="fake")(x, key)
    assert sum(str(node.target) == "shardwright.dropout.default" for node in graph.graph.nodes) == 2
    assert torch.equal(graph(x, key), step(x, key))

    def loss(x, key):
        sample = rand_normal(key, x.shape, x.shape, (0, 0), 1, x.dtype, x.device)
        return (
            dropout(x, key, 0.5, 0, x.shape, (0, 0)) * sample * bernoulli(x.sigmoid(), key, 2, x.shape, (0, 0))
        ).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for got, want in zip(torch.autograd.grad(compiled(x, key), x), torch.autograd.grad(loss(x, key), x), strict=True):
        assert torch.equal(got, want)


def test_a_shard_outside_its_tensor_is_refused():
    with pytest.raises(ShardwrightError, match=r"shape \[4\] at offset \[6\]"):
        rand_uniform(make_key(0), (4,), (8,), (6,), 0, torch.float32, CPU)
    with pytest.raises(RuntimeError, match="not torch"):
        rand_uniform(make_key(0), (4,), (8,), (0,), 0, torch.int64, CPU)
