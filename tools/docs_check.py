"""Runs every `$ command` of the ```console blocks of the given Markdown files and compares what it prints.

    python tools/docs_check.py README.md docs/*.md

`...` in the expected text stands for anything, also over several lines. A trailing `\\` continues a command. Commands
run in one scratch folder for each file, with the environment's programs first on the path, 80 columns wide. A line
`[exit N]` at the end of the expected text asks for that exit code; without it, 0 is expected.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FENCE = "```"
TIMEOUT_S = 120
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Example:
    """One command with the text expected after it. line: where it stands in its file, from 1."""

    line: int
    command: str
    expected: str
    exit_code: int


def read_examples(text: str) -> Iterator[Example]:
    lines = text.splitlines()
    inside = False
    start, command, expected = 0, "", []  # type: ignore[var-annotated]

    def finished() -> Iterator[Example]:
        if not command:
            return
        body, code = list(expected), 0
        if body and (match := re.fullmatch(r"\[exit (\d+)\]", body[-1])):
            code = int(match[1])
            body.pop()
        yield Example(start, command, "\n".join(body), code)

    for number, line in enumerate(lines, 1):
        if not inside:
            inside = line.strip() == FENCE + "console"
            command = ""
            continue
        if line.strip() == FENCE:
            yield from finished()
            inside = False
        elif line.startswith("$ "):
            yield from finished()
            start, command, expected = number, line[2:], []
        elif command.endswith("\\") and not expected:
            command = command[:-1] + line.strip()
        elif command:
            expected.append(line)


def matches(expected: str, found: str) -> bool:
    """Trailing blanks do not count; runs of spaces and of rule characters may differ in length."""
    parts = _tidy(expected).split("...")
    return re.fullmatch(".*?".join(re.escape(part) for part in parts), _tidy(found), re.DOTALL) is not None


def _tidy(text: str) -> str:
    lines = [re.sub(r"[ ]+", " ", re.sub(r"[─━]+", "─", line)).rstrip() for line in text.strip("\n").splitlines()]
    return "\n".join(lines).replace(" ...", "...").replace("... ", "...")


def run(example: Example, folder: Path) -> str:
    """'' where the command prints what is expected, else what is wrong."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    ours = {"PATH": path, "COLUMNS": "80", "NO_COLOR": "1", "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **ours}
    done = subprocess.run(
        ["bash", "-c", example.command],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    if done.returncode != example.exit_code:
        return f"exit code {done.returncode}, expected {example.exit_code}\n{done.stdout}"
    if matches(example.expected, done.stdout):
        return ""
    return "\n".join(
        difflib.unified_diff(example.expected.splitlines(), done.stdout.splitlines(), "doc", "found", lineterm="")
    )


def check_file(path: Path) -> tuple[int, int]:
    """(commands run, commands that failed)."""
    examples = list(read_examples(path.read_text()))
    failed = 0
    with tempfile.TemporaryDirectory(prefix="docs-check-") as name:
        folder = Path(name)
        for shared in ("examples",):
            (folder / shared).symlink_to(ROOT / shared)
        for example in examples:
            try:
                problem = run(example, folder)
            except subprocess.TimeoutExpired:
                problem = f"did not end within {TIMEOUT_S} s"
            if problem:
                failed += 1
                print(f"{path}:{example.line}: $ {example.command}\n{problem}\n")
    return len(examples), failed


def check_links(path: Path) -> list[str]:
    """Links to files that do not exist."""
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", path.read_text())
    return [
        f"{path}: link to {target}, which does not exist"
        for target in targets
        if "://" not in target and not (path.parent / target).exists()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    total = bad = 0
    for path in parser.parse_args().files:
        count, failed = check_file(path)
        broken = check_links(path)
        for line in broken:
            print(line)
        total, bad = total + count, bad + failed + len(broken)
    print(f"docs-check: {total} commands, {bad} problems")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
