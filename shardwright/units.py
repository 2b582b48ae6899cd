"""Units and how they are printed. Open to every folder; imports nothing of the package."""

from __future__ import annotations

import re

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
GB = 10**9
MAX_BYTES = 1 << 60


def format_bytes(num_bytes: float) -> str:
    """Binary units, as memory is sold and reported: 1536 MiB prints as '1.50 GiB'."""
    for unit, size in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= size:
            return f"{num_bytes / size:.2f} {unit}"
    return f"{num_bytes:.0f} B"


def format_seconds(seconds: float) -> str:
    if abs(seconds) >= 1:
        return f"{seconds:.2f} s"
    if abs(seconds) >= 1e-3:
        return f"{seconds * 1e3:.2f} ms"
    return f"{seconds * 1e6:.1f} us"


def format_count(count: float) -> str:
    for suffix, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if abs(count) >= size:
            return f"{count / size:.2f}{suffix}"
    return f"{count:.0f}"


_BYTE_UNITS = {
    "": 1, "B": 1, "K": KIB, "KIB": KIB, "M": MIB, "MIB": MIB, "G": GIB, "GIB": GIB, "T": GIB * 1024, "TIB": GIB * 1024,
    "KB": 10**3, "MB": 10**6, "GB": GB, "TB": 10**12,
}  # fmt: skip


def parse_bytes(text: str) -> int:
    """'600MiB' -> 629145600. Binary units (KiB, MiB, GiB, TiB; K, M, G, T alone mean these) and decimal ones (MB, GB).

    Raises ValueError where the text is not a positive number with one of these units.
    """
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in _BYTE_UNITS:
        raise ValueError(f"{text!r} is not an amount of memory such as 600MiB or 80GiB")
    num_bytes = float(match[1]) * _BYTE_UNITS[match[2].upper()]
    if not 1 <= num_bytes <= MAX_BYTES:
        raise ValueError(f"{text[:40]!r} is not an amount of memory between 1 B and {MAX_BYTES >> 40} TiB")
    return int(num_bytes)
