"""How fast the operators of kernels/ are beside what torch does for the same work.

    python benchmarks/kernels.py [--device cpu|cuda] [--repeats N] [--json]

For each: milliseconds of ours and of the peer, the least of N runs taken in turn, so that a busy moment of the
machine strikes both. On an NVIDIA GPU also our reference, to show what the Triton kernel gains. Forward and backward
together where there is a backward.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F

from shardwright.kernels import generator
from shardwright.kernels.ops import add_rms_norm, attention, dropout, make_key, rand_normal, rand_uniform
from shardwright.kernels.rms_norm import rms_norm_backward_reference, rms_norm_reference

Run = Callable[[], object]


@dataclass(frozen=True)
class Case:
    name: str
    shape: str
    runs: dict[str, Run]  # 'ours', the peer's name, perhaps 'reference'


@dataclass(frozen=True)
class Result:
    name: str
    shape: str
    milliseconds: dict[str, float]


def machine(device: torch.device) -> str:
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            processor = next((line.split(":")[1].strip() for line in file if line.startswith("model name")), processor)
    parts = [f"{processor}, {os.cpu_count()} cores, {torch.get_num_threads()} threads", f"torch {torch.__version__}"]
    if device.type == "cuda":
        parts.append(torch.cuda.get_device_name(device))
    if importlib.util.find_spec("triton") is not None:
        from triton import __version__ as triton_version

        parts.append(f"triton {triton_version}")
    return "; ".join([*parts, f"Python {platform.python_version()}"])


def forward_backward(function: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> Run:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    grad = torch.randn_like(function(*leaves))
    return lambda: torch.autograd.grad(function(*leaves), leaves, grad)


def llama_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Residual addition and norm as transformers' Llama writes them; both results are used."""
    total = x + residual
    hidden = total.to(torch.float32)
    hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * hidden.to(x.dtype) + total


def attention_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    length = 4096 if device.type == "cuda" else 512
    for heads, kv_heads, causal in ((8, 8, True), (8, 2, True), (8, 8, False)):
        query, key, value = (
            torch.randn(2, h, length, 64, device=device, dtype=dtype) for h in (heads, kv_heads, kv_heads)
        )

        def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = causal) -> torch.Tensor:
            return attention(q, k, v, None, None, 0.125, causal, 0, 0.0, 0, None, None)[0]

        def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool = causal) -> torch.Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.125, enable_gqa=True)

        runs = {f.__name__: forward_backward(f, query, key, value) for f in (ours, sdpa)}
        yield Case(f"attention{' causal' * causal}", f"2x{heads}({kv_heads})x{length}x64 {dtype}", runs)
    query = query[:, :, :256]
    rng_key, options = make_key(0, device=device), (0.125, True, 0, 0.1, 0, None, None)
    runs = {
        "ours": forward_backward(lambda q, k, v: attention(q, k, v, None, rng_key, *options)[0], query, query, query),
        "sdpa": forward_backward(
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.1, True, scale=0.125), query, query, query
        ),
    }
    yield Case("attention dropout", f"{'x'.join(map(str, query.shape))} {dtype}", runs)


def random_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    size = (8192, 8192) if device.type == "cuda" else (1024, 1024)
    for shape in (size, (64, 128)):
        x, key, zeros = torch.randn(shape, device=device, dtype=dtype), make_key(0, device=device), [0, 0]
        new = (key, shape, shape, zeros, 0, dtype, device)
        label = f"{'x'.join(map(str, shape))} {dtype}"

        def ours(x: torch.Tensor, key: torch.Tensor = key, shape: tuple[int, int] = shape) -> torch.Tensor:
            return dropout(x, key, 0.1, 0, shape, [0, 0])

        cases = [
            ("dropout", {"ours": forward_backward(ours, x), "torch": forward_backward(lambda x: F.dropout(x, 0.1), x)}),
            ("rand_uniform", {"ours": lambda n=new: rand_uniform(*n), "torch": lambda x=x: torch.rand_like(x)}),
            ("rand_normal", {"ours": lambda n=new: rand_normal(*n), "torch": lambda x=x: torch.randn_like(x)}),
        ]
        if device.type == "cuda":
            cases[1][1]["reference"] = lambda n=new: generator.uniform(*n)
        yield from (Case(name, label, runs) for name, runs in cases)


def norm_cases(device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    rows, dim = (16384, 4096) if device.type == "cuda" else (2048, 1024)
    x, residual = (torch.randn(rows, dim, device=device, dtype=dtype) for _ in range(2))
    weight = torch.randn(dim, device=device, dtype=dtype)

    def ours(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y, total, _ = add_rms_norm(x, residual, weight, 1e-5, True)
        return y + total

    runs = {
        "ours": forward_backward(ours, x, residual, weight),
        "llama": forward_backward(llama_norm, x, residual, weight),
    }
    if device.type == "cuda":
        rstd = rms_norm_reference(x, weight, 1e-5, True)[1]

        def reference() -> None:
            rms_norm_reference(x + residual, weight, 1e-5, True)
            rms_norm_backward_reference(x, residual, x, rstd, weight, True)

        runs["reference"] = reference
    yield Case("add_rms_norm", f"{rows}x{dim} {dtype}", runs)


def measure(case: Case, repeats: int, device: torch.device) -> Result:
    best = dict.fromkeys(case.runs, float("inf"))
    for _ in range(repeats + 1):  # the first is the warm-up: it is the slowest, so the minimum leaves it out
        for name, run in case.runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            best[name] = min(best[name], time.perf_counter() - start)
    return Result(case.name, case.shape, {name: seconds * 1e3 for name, seconds in best.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="one JSON document on standard output")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    results = []
    if not arguments.json:
        print(machine(device))
        print(f"{'operator':20} {'shape':40} milliseconds, and ours beside the peer")
    for cases in (attention_cases, random_cases, norm_cases):
        for case in cases(device, dtype):
            result = measure(case, arguments.repeats, device)
            results.append(result)
            if not arguments.json:
                times = "  ".join(f"{name} {value:.3f}" for name, value in result.milliseconds.items())
                peer = list(result.milliseconds.values())[1]
                print(f"{result.name:20} {result.shape:40} {times}  ({result.milliseconds['ours'] / peer:.2f}x)")
    if arguments.json:
        print(json.dumps({"machine": machine(device), "results": [asdict(result) for result in results]}, indent=1))


if __name__ == "__main__":
    main()
