"""check"""
from __future__ import annotations
import argparse
NAME = "check"
HELP = "check"
def add_arguments(parser: argparse.ArgumentParser) -> None: ...
def execute(args: argparse.Namespace) -> int:
    return 0
