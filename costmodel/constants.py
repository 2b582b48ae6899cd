"""The cost model's constants: costmodel/constants.toml read into records, each with its source.

The file has one table a constant group; a key such as `nvlink` inside a group overrides the group's `default`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CONSTANTS_FILE = Path(__file__).parent / "constants.toml"


@dataclass(frozen=True)
class Constant:
    """One constant. kind: datasheet | measured | fitted | assumed. The unit is in the name."""

    name: str
    value: float
    kind: str
    source: str
    date: str
    meaning: str


@dataclass(frozen=True, eq=False)
class Constants:
    """All of them; compared by identity, so that functions of them can be cached.

    Look up with get('group', key): the key's own value, else the group's default.
    """

    table: Mapping[str, Constant]

    def get(self, group: str, *keys: str) -> float:
        """The first of keys that the group holds, else its default. Raises KeyError where there is neither."""
        for key in (*keys, "default"):
            found = self.table.get(f"{group}.{key}")
            if found is not None:
                return found.value
        raise KeyError(f"constant {group} has none of {', '.join(keys)} and no default")

    def rows(self) -> list[dict[str, str]]:
        """For printing: name, value, kind, source, date, meaning."""
        return [
            {
                "name": constant.name,
                "value": f"{constant.value:g}",
                "kind": constant.kind,
                "source": constant.source,
                "date": constant.date,
                "meaning": constant.meaning,
            }
            for constant in self.table.values()
        ]

    def replaced(self, values: Mapping[str, float]) -> Constants:
        """A copy with other values ('group.key' -> value), for fits. A new key takes its group's default's source."""
        table = dict(self.table)
        for name, value in values.items():
            old = table.get(name) or table[name.split(".")[0] + ".default"]
            table[name] = Constant(name, value, old.kind, old.source, old.date, old.meaning)
        return Constants(table)


def parse_constants(document: Mapping[str, Any]) -> Constants:
    sources = document["sources"]
    table = {}
    for group, entries in document["constants"].items():
        for key, entry in entries.items():
            if key == "meaning":
                continue
            source = sources[entry["source"]]
            name = f"{group}.{key}"
            table[name] = Constant(
                name, float(entry["value"]), source["kind"], source["title"], source["date"], entries["meaning"]
            )
    return Constants(table)


@cache
def default_constants() -> Constants:
    with CONSTANTS_FILE.open("rb") as file:
        return parse_constants(tomllib.load(file))


@cache
def assumed(group: str, *keys: str) -> float:
    """A constant that no fit replaces: of memory, of software, of the search."""
    return default_constants().get(group, *keys)
