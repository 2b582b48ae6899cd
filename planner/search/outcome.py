"""What the search learned of each candidate, and the runner-ups with the reason each lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ...plans import document as plan_document
from ...plans.axes import MeshShape, inner_axes
from ...units import format_bytes, format_seconds
from ..interfaces import ShardingSolution
from ..space.candidates import Candidate
from ..stages.chain import NOTHING, Recompute

MAX_ROWS = 24
MAX_MISFITS = 4
FASTER = 1 - 1e-6


@dataclass(frozen=True)
class Outcome:
    """What is known of a candidate; what is learned later makes another of it.

    bound_s: proven for every sharding, infinite where nothing fits; search_bound_s: under the sharding found.
    fits: None where not looked at."""

    candidate: Candidate
    bound_s: float = 0.0
    search_bound_s: float = 0.0
    step_s: float | None = None
    bounds: tuple[int, ...] = ()
    recompute: Recompute = NOTHING
    recompute_all: bool = False
    solution: ShardingSolution | None = None
    peak_bytes: int | None = None
    limit_bytes: int = 0
    missing_bytes: int = 0
    worst_rank: int = 0
    lacks_host: bool = False  # the bytes above are of the host's memory
    fits: bool | None = None
    unsharded: bool = False
    too_slow: bool = False  # with the least recomputation that might fit
    tight: bool = False  # memory keeps it from its fastest cuts and placements
    assumed: bool = False  # not to fit, as a smaller microbatch does not
    note: str = ""

    @property
    def recompute_label(self) -> str:
        if not self.recompute:
            return "none"
        return "all" if self.recompute_all else "some"


def is_preferable(outcome: Outcome, other: Outcome) -> bool:
    """Is it faster than the other, and no larger?"""
    if outcome.step_s is None or other.step_s is None or outcome.peak_bytes is None or other.peak_bytes is None:
        return False
    return outcome.step_s < other.step_s * FASTER and outcome.peak_bytes <= other.peak_bytes


def _reason(outcome: Outcome, best: Outcome, interrupted: str, order_error: float) -> str:
    assert best.step_s is not None
    if outcome.unsharded:
        return f"{outcome.candidate.mesh.inner_part.text(inner_axes())} cannot shard this model"
    if outcome.fits is False:
        of = " of host memory" if outcome.lacks_host else ""
        return f"needs {format_bytes(outcome.peak_bytes or 0)} of {format_bytes(outcome.limit_bytes)}{of}"
    if outcome.step_s is not None:
        slower = outcome.step_s / best.step_s - 1
        if slower <= 5e-4:
            return "as fast, not better"
        return f"slower by {100 * slower:.1f} %" + (", a tie" if slower <= order_error else "")
    if outcome.note:
        return outcome.note
    bound_s = max(outcome.bound_s, outcome.search_bound_s)
    if outcome.too_slow and bound_s < best.step_s:
        return "with the recomputation that it needs, its bound is above the incumbent"
    if bound_s >= best.step_s * 0.999:
        return f"bound {format_seconds(bound_s)} is above the incumbent"
    return f"not reached before {interrupted}" if interrupted else f"bound {format_seconds(bound_s)}"


def considered_rows(
    candidates: Iterable[Candidate],
    outcomes: Mapping[Candidate, Outcome],
    best: Outcome,
    interrupted: str,
    order_error: float = 0.0,
) -> list[plan_document.Considered]:
    """The best of each mesh, the nearest that do not fit, then the best of the rest; the chosen one left out.
    Candidates that come to the same plan, as all schedules of one microbatch do, are one row. order_error: what two
    predicted steps may differ by and still be a tie."""
    known = [outcomes[c] if c in outcomes else Outcome(c) for c in candidates if c != best.candidate]

    def rank(outcome: Outcome) -> tuple[int, float]:
        if outcome.step_s is not None:
            return 0, outcome.step_s
        if outcome.fits is False:
            return 1, outcome.missing_bytes
        if outcome.unsharded:
            return 3, 0.0
        return 2, max(outcome.bound_s, outcome.search_bound_s)

    known.sort(key=lambda outcome: (*rank(outcome), *outcome.candidate.simplicity))
    alike = {_figures(best)}
    single = [outcome for outcome in known if outcome.step_s is None or not _seen(_figures(outcome), alike)]
    first_of_mesh: dict[MeshShape, Outcome] = {}
    for outcome in single:
        c = outcome.candidate
        first_of_mesh.setdefault(c.mesh, outcome)
    chosen = sorted(first_of_mesh.values(), key=rank)[: MAX_ROWS // 2]
    taken = {outcome.candidate for outcome in chosen}
    misfits = [outcome for outcome in single if outcome.fits is False and outcome.candidate not in taken][:MAX_MISFITS]
    chosen += misfits
    taken |= {outcome.candidate for outcome in misfits}
    chosen += [outcome for outcome in single if outcome.candidate not in taken][: MAX_ROWS - len(chosen)]
    return [_row(outcome, best, interrupted, order_error) for outcome in sorted(chosen, key=rank)]


def _figures(outcome: Outcome) -> tuple[object, ...]:
    c = outcome.candidate
    step = float(f"{outcome.step_s or 0.0:.6g}")
    return c.mesh, c.microbatch, c.extents, c.on_host, outcome.recompute, step, outcome.peak_bytes


def _seen(figures: tuple[object, ...], known: set[tuple[object, ...]]) -> bool:
    """Are they among those known? They are from now on."""
    before = figures in known
    known.add(figures)
    return before


def _row(outcome: Outcome, best: Outcome, interrupted: str, order_error: float) -> plan_document.Considered:
    c = outcome.candidate
    chunks = f" x{c.virtual_stages}" if c.virtual_stages > 1 else ""
    return plan_document.Considered(
        mesh=plan_document.Mesh.of(c.mesh),
        microbatch=c.microbatch,
        schedule=c.schedule + chunks,
        zero=c.zero,
        zero_extents=c.extents._asdict() if c.split is not None else {},
        optimizer_state="host" if c.on_host else "device",
        recompute=outcome.recompute_label,
        step_s=outcome.step_s,
        peak_bytes=outcome.peak_bytes,
        reason=_reason(outcome, best, interrupted, order_error),
    )
