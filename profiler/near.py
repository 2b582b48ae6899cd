"""Near matches for a name that a user mistyped."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


def near_matches(name: str, known: Sequence[str], limit: int = 4) -> list[str]:
    """The known names closest to name, closest first: those that contain it, then those spelled like it."""
    lowered = name.lower()
    containing = [entry for entry in known if lowered and (lowered in entry.lower() or entry.lower() in lowered)]
    spelled = difflib.get_close_matches(name, known, n=limit, cutoff=0.5)
    return list(dict.fromkeys([*spelled, *sorted(containing, key=len)]))[:limit]
