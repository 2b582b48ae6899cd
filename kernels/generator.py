"""The reference generator: random numbers as a function of (seed, step, operator, global element index).

Element g of operator n at step s under seed k takes 32-bit word g % 4 of the Philox4x32-10 block with

    counter = (low 32 bits of g // 4, high 32 bits, n + 2**31 * stream, s)      key = (low 32 bits of k, high 32 bits)

where g = microbatch * numel(global tensor) + row-major index in the global tensor and n = random_base + rng_index.
Stream 0 gives an element's leading 32 bits, stream 1 the next 32, which only float64 needs: a float32 number is thus
the float64 one cut short. Nothing depends on how the tensor is cut, so any shard equals the slice of the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from .philox import MASK_32, philox4x32
from .shards import Runs, runs_of

KEY_WORDS = ("seed", "step", "microbatch", "random_base")
STREAM_BIT = 1 << 31
_CHUNK_BLOCKS = (
    1 << 14
)  # blocks worked on at once: 128 KiB for each of the dozen temporaries, so that they stay in cache

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
# words of each stream asked for -> the values of the four elements of each block
Fill = Callable[..., Sequence[torch.Tensor]]


def make_key(
    seed: int, step: int = 0, microbatch: int = 0, random_base: int = 0, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The key tensor that every random operator takes: int64 [4]. seed may be any 64-bit integer, signed or not."""
    seed = (seed + 2**63) % 2**64 - 2**63
    return torch.tensor([seed, step, microbatch, random_base], dtype=torch.int64, device=device)


def _key_words(key: torch.Tensor) -> list[int] | list[torch.Tensor]:
    """On the CPU plain integers, which are faster; elsewhere 0-dimensional tensors, which need no synchronization."""
    return key.tolist() if key.device.type == "cpu" else list(key.unbind())


def _block_words(blocks: torch.Tensor, key: torch.Tensor, rng_index: int, stream: int) -> Words:
    seed, step, _, base = _key_words(key)
    operator = ((base + rng_index) & (STREAM_BIT - 1)) + stream * STREAM_BIT
    return philox4x32(
        (blocks & MASK_32, blocks >> 32, operator, step & MASK_32), (seed & MASK_32, (seed >> 32) & MASK_32)
    )


def _chunks(num_rows: int, per_row: int) -> Iterator[tuple[int, int, int, int]]:
    """Rectangles (first row, last row, first column, last column) of at most _CHUNK_BLOCKS blocks."""
    rows = max(1, _CHUNK_BLOCKS // max(per_row, 1))
    columns = min(per_row, _CHUNK_BLOCKS)
    for row in range(0, num_rows, rows):
        for column in range(0, per_row, columns):
            yield row, min(row + rows, num_rows), column, min(column + columns, per_row)


def generate(
    key: torch.Tensor,
    local_shape: Sequence[int],
    global_shape: Sequence[int],
    offset: Sequence[int],
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
    num_streams: int = 1,
) -> torch.Tensor:
    """A tensor of local_shape; fill(words of each stream) makes four consecutive elements of the whole."""
    runs = runs_of(local_shape, global_shape, offset)
    key = key if key.device == device else key.to(device)
    base = _key_words(key)[2] * runs.global_numel
    shift = runs.shift()
    if isinstance(base, int) and shift is not None:
        shift = (shift + base) % 4
    elif runs.global_numel % 4 and not isinstance(base, int):
        shift = None
    return _generate(key, runs, base, shift, rng_index, dtype, device, fill, num_streams).view(tuple(local_shape))


def _generate(
    key: torch.Tensor,
    runs: Runs,
    base: int | torch.Tensor,
    shift: int | None,
    rng_index: int,
    dtype: torch.dtype,
    device: torch.device,
    fill: Fill,
    num_streams: int,
) -> torch.Tensor:
    num_runs, run = runs.num_runs, runs.run
    if num_runs * run == 0:
        return torch.empty(0, dtype=dtype, device=device)
    # a run that begins `shift` elements into a block touches that many blocks; where runs differ, 3 is the most
    per_run = -(-(run + (3 if shift is None else shift)) // 4)
    padded = torch.empty(num_runs, per_run, 4, dtype=dtype, device=device)
    for row, last_row, column, last_column in _chunks(num_runs, per_run):
        first_blocks = (runs.starts(row, last_row, device) + base) >> 2
        blocks = first_blocks[:, None] + torch.arange(column, last_column, dtype=torch.int64, device=device)
        words = [_block_words(blocks, key, rng_index, stream) for stream in range(num_streams)]
        for lane, values in enumerate(fill(*words)):
            padded[row:last_row, column:last_column, lane] = values
    flat = padded.view(num_runs, per_run * 4)
    if shift is not None:
        return flat[:, shift : shift + run].contiguous()
    shifts = (runs.starts(0, num_runs, device) + base) & 3
    return flat.gather(1, shifts[:, None] + torch.arange(run, dtype=torch.int64, device=device))


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
    return generate(
        key,
        local_shape,
        global_shape,
        offset,
        rng_index,
        torch.bool,
        device,
        lambda words: [w >= threshold for w in words],
    )
