"""Times messages between the processes of a job: each pair of hosts, and what all processes of a host reach at once.

The time of a message is latency + bytes / rate: the latency is that of the smallest, the rate that of a large one less
the latency. All other processes wait meanwhile. Processes of one host are taken together by an all-reduce, which keeps
every one of its links busy. Between hosts a message goes there and back, as transports differ in whether they send both
ways at once; processes of the same number on the two do so all at once, so that a port that they share counts as each
one's share.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist

from .profiler.measured_hardware import MeasuredLink
from .profiler.measuring import synchronize_of
from .runtime.together import of_all_ranks

SMALL_BYTES = 4
FIRST_BYTES = 1 << 18  # of a large message; larger where the link is quick
ENOUGH_S = 0.1  # that a large message takes
MOST_BYTES = 1 << 28
REPEATS = 5
MOST_HOSTS = 24  # of which every pair is measured; of more, each with the next ones by powers of two


def hosts_of(ranks_of_host: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """The pairs of hosts that are measured."""
    count = len(ranks_of_host)
    if count <= MOST_HOSTS:
        yield from itertools.combinations(range(count), 2)
        return
    for host in range(count):
        for step in (2**k for k in range(count.bit_length())):
            if host + step < count:
                yield host, host + step


def ranks_by_host(name: str) -> list[list[int]]:
    """Ranks of each host, by the names that the processes give for theirs, in the order of their first ranks."""
    found: dict[str, list[int]] = {}
    for rank, host in enumerate(of_all_ranks(name)):
        found.setdefault(host, []).append(rank)
    return list(found.values())


def measure_links(ranks_of_host: Sequence[Sequence[int]], device: torch.device) -> list[MeasuredLink]:
    """Every process calls it; all get all. Needs a process group."""
    found = [link for host in range(len(ranks_of_host)) if (link := _inside(host, ranks_of_host, device)) is not None]
    return found + [_between(pair, ranks_of_host, device) for pair in hosts_of(ranks_of_host)]


def _inside(host: int, ranks_of_host: Sequence[Sequence[int]], device: torch.device) -> MeasuredLink | None:
    ranks = ranks_of_host[host]
    if len(ranks) < 2:
        return None
    group = dist.new_group(list(ranks))
    mine = dist.get_rank() in ranks

    def run(num_bytes: int) -> None:
        tensor = torch.zeros(num_bytes // 4, device=device)
        dist.all_reduce(tensor, group=group)

    steps = 2 * (len(ranks) - 1)
    latency_s, bytes_per_s = _curve(run, device, mine, share=steps / len(ranks))
    return MeasuredLink((host, host), latency_s / steps, bytes_per_s)


def _between(pair: tuple[int, int], ranks_of_host: Sequence[Sequence[int]], device: torch.device) -> MeasuredLink:
    ends = {a: b for a, b in zip(*(ranks_of_host[host] for host in pair), strict=False)}
    ends |= {b: a for a, b in ends.items()}
    other = ends.get(dist.get_rank())

    def run(num_bytes: int) -> None:
        """There and back."""
        assert other is not None
        tensor = torch.zeros(num_bytes // 4, device=device)
        first, second = (dist.send, dist.recv) if dist.get_rank() < other else (dist.recv, dist.send)
        first(tensor, other)
        second(tensor, other)

    both_s, bytes_per_s = _curve(run, device, other is not None, share=2.0)
    return MeasuredLink(pair, both_s / 2, bytes_per_s)


def _curve(run: Callable[[int], None], device: torch.device, takes_part: bool, share: float) -> tuple[float, float]:
    """(seconds of the smallest message, bytes/s of one process). share: of a message's bytes that one process sends."""
    latency_s = max(of_all_ranks(_median_s(run, SMALL_BYTES, device) if takes_part else 0.0))
    num_bytes = FIRST_BYTES
    while True:
        seconds = max(of_all_ranks(_median_s(run, num_bytes, device) if takes_part else 0.0))
        if seconds >= ENOUGH_S or num_bytes >= MOST_BYTES:
            return latency_s, share * num_bytes / max(seconds - latency_s, 1e-9)
        num_bytes = min(MOST_BYTES, num_bytes * max(2, min(16, int(ENOUGH_S / max(seconds, 1e-6)))))


def _median_s(run: Callable[[int], None], num_bytes: int, device: torch.device) -> float:
    synchronize = synchronize_of(device)
    times = []
    for _ in range(1 + REPEATS):
        synchronize()
        started = time.perf_counter()
        run(num_bytes)
        synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
