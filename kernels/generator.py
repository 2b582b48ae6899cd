"""The reference generator: random numbers as a function of (seed, step, operator, global element index).

Element g of operator n at step s under seed k takes 32-bit word g % 4 of the Philox4x32-10 block with

    counter = (low 32 bits of g // 4, high 32 bits, n + 2**31 * stream, s)      key = (low 32 bits of k, high 32 bits)

where g = microbatch * numel(global tensor) + row-major index in the global tensor and n = random_base + rng_index.
Stream 0 gives an element's leading 32 bits, stream 1 the next 32, which only float64 needs: a float32 number is thus
the float64 one cut short. Nothing depends on how the tensor is cut, so any shard equals the slice of the whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from .philox import MASK_32, philox4x32
from .shards import runs_of

STREAM_BIT = 1 << 31
_CHUNK_BLOCKS = 1 << 15  # for each thread at once: 256 KiB in each temporary, so that they stay in cache

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# words of each stream asked for -> the values of the four elements of each block
Fill = Callable[..., Sequence[torch.Tensor]]


def make_key(
    seed: int, step: int = 0, microbatch: int = 0, random_base: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The key tensor that every random operator takes: int64 [4]. seed may be any 64-bit integer, signed or not."""
    seed = (seed + 2**63) % 2**64 - 2**63
    return torch.tensor([seed, step, microbatch, random_base], dtype=torch.int64, device=device)


@dataclass(frozen=True)
class _Key:
    """The words of a key: integers where it lives on the CPU, else 0-dimensional tensors, to save a synchronization."""

    seed: int | torch.Tensor
    step: int | torch.Tensor
    microbatch: int | torch.Tensor
    operator: int | torch.Tensor

    @classmethod
    def read(cls, key: torch.Tensor, rng_index: int, device: torch.device) -> _Key:
        seed, step, microbatch, base = key.tolist() if key.device.type == "cpu" else key.to(device).unbind()
        return cls(seed, step, microbatch, (base + rng_index) & (STREAM_BIT - 1))

    def words(self, blocks: torch.Tensor, below_2_to_32: bool, stream: int) -> Words:
        low, high = (blocks, 0) if below_2_to_32 else (blocks & MASK_32, blocks >> 32)
        counter = (low, high, self.operator + stream * STREAM_BIT, self.step & MASK_32)
        return philox4x32(counter, (self.seed & MASK_32, (self.seed >> 32) & MASK_32))


def _chunks(num_rows: int, per_row: int) -> Iterator[tuple[int, int, int, int]]:
    """Rectangles (first row, last row, first column, last column) of few enough blocks."""
    limit = _CHUNK_BLOCKS * torch.get_num_threads()
    rows = max(1, limit // max(per_row, 1))
    columns = min(per_row, limit)
    for row in range(0, num_rows, rows):
        for column in range(0, per_row, columns):
            yield row, min(row + rows, num_rows), column, min(column + columns, per_row)


@dataclass(frozen=True)
class _Part:
    """A shard of a whole tensor: its shape, the whole's, and where in the whole it begins."""

    shape: Sequence[int]
    global_shape: Sequence[int]
    offset: Sequence[int]


def _generate(
    key: torch.Tensor,
    part: _Part,
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
    num_streams: int = 1,
) -> torch.Tensor:
    """The shard; fill(words of each stream) makes four consecutive elements of the whole."""
    runs, local_shape = runs_of(part.shape, part.global_shape, part.offset), tuple(part.shape)
    if runs.num_runs * runs.run == 0:
        return torch.empty(local_shape, dtype=dtype, device=device)
    words_key = _Key.read(key, rng_index, device)
    base = words_key.microbatch * runs.global_numel
    shift = runs.shift()
    below_2_to_32 = False
    if isinstance(base, int):
        below_2_to_32 = 0 <= base < 2**34 - runs.global_numel
        shift = None if shift is None else (shift + base) % 4
    elif runs.global_numel % 4:
        shift = None  # where a block begins depends on the microbatch, which only the device knows
    # a run that begins `shift` elements into a block touches that many blocks; where runs differ, 3 is the most
    per_run = -(-(runs.run + (3 if shift is None else shift)) // 4)
    padded = torch.empty(runs.num_runs, per_run, 4, dtype=dtype, device=device)
    for row, last_row, column, last_column in _chunks(runs.num_runs, per_run):
        blocks = torch.arange(column, last_column, dtype=torch.int64, device=device)
        if runs.num_runs == 1:
            blocks = blocks.add_((runs.start + base) >> 2).unsqueeze(0)
        else:
            blocks = ((runs.starts(row, last_row, device) + base) >> 2)[:, None] + blocks
        words = [words_key.words(blocks, below_2_to_32, stream) for stream in range(num_streams)]
        for lane, values in enumerate(fill(*words)):
            padded[row:last_row, column:last_column, lane] = values
    flat = padded.view(runs.num_runs, per_run * 4)
    if shift is not None:
        return flat[:, shift : shift + runs.run].reshape(local_shape)
    shifts = (runs.starts(0, runs.num_runs, device) + base) & 3
    places = shifts[:, None] + torch.arange(runs.run, dtype=torch.int64, device=device)
    return flat.gather(1, places).view(local_shape)


# digits of a number in [0, 1): as many leading bits of the element's words as the dtype holds exactly
UNIFORM_BITS = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


def _uniform_words(
    words: Sequence[torch.Tensor], low: Sequence[torch.Tensor] | None, dtype: torch.dtype
) -> list[torch.Tensor]:
    bits = UNIFORM_BITS[dtype]
    if low is None:
        return [(word >> (32 - bits)).to(dtype).mul_(2.0**-bits) for word in words]
    return [((word << 21) | (tail >> 11)).to(dtype).mul_(2.0**-bits) for word, tail in zip(words, low, strict=True)]


def uniform_bits(dtype: torch.dtype) -> int:
    torch._check(
        dtype in UNIFORM_BITS, lambda: f"random numbers are float64, float32, float16 or bfloat16, not {dtype}"
    )
    return UNIFORM_BITS[dtype]


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums, exponentials and the like are worked out in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def uniform(
    key: torch.Tensor,
    local_shape: Sequence[int],
    global_shape: Sequence[int],
    offset: Sequence[int],
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Uniform in [0, 1): the element's leading 53, 24, 11 or 8 bits as a binary fraction, by dtype."""
    uniform_bits(dtype)

    def fill(words: Words, low: Words | None = None) -> list[torch.Tensor]:
        return _uniform_words(words, low, dtype)

    streams = 2 if dtype == torch.float64 else 1
    return _generate(key, _Part(local_shape, global_shape, offset), rng_index, dtype, device, fill, streams)


def normal(
    key: torch.Tensor,
    local_shape: Sequence[int],
    global_shape: Sequence[int],
    offset: Sequence[int],
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    """Standard normal, by Box and Muller (1958) from the uniform numbers u, v of elements 2m and 2m + 1:

        r = sqrt(-2 log(1 - u))     element 2m: r cos(2 pi v)     element 2m + 1: r sin(2 pi v)

    float16 and bfloat16 are rounded from float32.
    """
    uniform_bits(dtype)
    wide = accumulate_dtype(dtype)

    def fill(words: Words, low: Words | None = None) -> list[torch.Tensor]:
        u0, v0, u1, v1 = _uniform_words(words, low, wide)
        values = []
        for u, v in ((u0, v0), (u1, v1)):
            radius = u.neg_().add_(1).log_().mul_(-2).sqrt_()
            angle = v.mul_(2 * math.pi)
            values += [radius * angle.cos(), radius * angle.sin()]
        return values

    streams = 2 if dtype == torch.float64 else 1
    return _generate(key, _Part(local_shape, global_shape, offset), rng_index, dtype, device, fill, streams)


def keep_threshold(p: float) -> int:
    """An element is kept where its 32-bit word is at least p * 2**32: exact to 2**-32, and the same for every dtype."""
    return min(round(p * 2**32), 2**32)


def keep_scale(p: float) -> float:
    """What dropout multiplies the kept elements by: 1 / (1 - p), and 0 where nothing is kept."""
    return 1 / (1 - p) if p < 1 else 0.0


def keep_mask(
    key: torch.Tensor,
    local_shape: Sequence[int],
    global_shape: Sequence[int],
    offset: Sequence[int],
    rng_index: int,
    p: float,
    device: torch.device,
) -> torch.Tensor:
    """bool: True where dropout with probability p keeps the element."""
    threshold = keep_threshold(p)
    part = _Part(local_shape, global_shape, offset)
    return _generate(key, part, rng_index, torch.bool, device, lambda words: [w >= threshold for w in words])


def dropout(
    input: torch.Tensor,
    key: torch.Tensor,
    p: float,
    rng_index: int,
    global_shape: Sequence[int],
    offset: Sequence[int],
) -> torch.Tensor:
    """input * keep / (1 - p), contiguous. The element is kept where its leading 32 bits are at least p * 2**32."""
    keep = keep_mask(key, input.shape, global_shape, offset, rng_index, p, input.device)
    return torch.mul(input.contiguous(), keep).mul_(keep_scale(p))
