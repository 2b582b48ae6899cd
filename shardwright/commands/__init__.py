"""One module for each subcommand: NAME, HELP, add_arguments(parser), execute(args) -> exit code.

Modules import torch and the planner inside execute, never at the top.
"""

from __future__ import annotations

import argparse
from typing import Protocol

from . import check, diff, doctor, explain, fits, hardware, models, plan, profile, run, schedule


class Command(Protocol):
    __doc__: str | None
    NAME: str
    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None: ...

    def execute(self, args: argparse.Namespace) -> int: ...


COMMANDS: tuple[Command, ...] = (
    plan,
    fits,
    explain,
    diff,
    run,
    check,
    schedule,
    models,
    hardware,
    profile,
    doctor,
)
