"""run"""
from __future__ import annotations
import argparse
NAME = "run"
HELP = "run"
def add_arguments(parser: argparse.ArgumentParser) -> None: ...
def execute(args: argparse.Namespace) -> int:
    return 0
