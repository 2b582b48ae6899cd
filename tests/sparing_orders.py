"""Published orders in which single activations are let go and brought back."""

from __future__ import annotations

import random

from shardwright.costmodel.actions import Action
from shardwright.plans.document import Plan
from shardwright.plans.order import pipeline_schedule
from shardwright.schedules.schedule import SYNTHESIZED


def letting_go(plan: Plan, seed: int = 0) -> Plan:
    """The plan with an order of its own: of each activation it is drawn whether it is kept, recomputed or offloaded,
    and when that happens between its forward and its backward."""
    rng, schedule = random.Random(seed), pipeline_schedule(plan)
    rows = []
    for actions in schedule.ranks:
        row = list(actions)
        for forward in [action for action in actions if action.kind == "F"]:
            kinds = rng.choice(("", "R", "OL"))
            begin = row.index(forward) + 1
            end = next(at for at, action in enumerate(row) if action[1:] == forward[1:] and action.kind in "IB")
            for kind, at in zip(kinds, sorted(rng.choices(range(begin, end + 1), k=len(kinds))), strict=True):
                begin = max(begin, at)
                row.insert(begin, Action(kind, *forward[1:]))
                begin += 1
        rows.append(row)
    changed = plan.model_copy(deep=True)
    changed.schedule.name, changed.schedule.stage_rank = SYNTHESIZED, list(schedule.stage_rank)
    changed.schedule.order = [" ".join(map(str, row)) for row in rows]
    return changed
