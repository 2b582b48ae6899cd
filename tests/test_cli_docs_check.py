"""The tool that keeps the documentation's examples true."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import docs_check

PAGE = """
Text with a `$ command` that is none.

```console
$ echo one; echo two
one
two
$ echo a b | \\
  tr a c
c b
```

```text
$ not run
```

```console
$ echo nine 12.3 s; exit 3
nine ... s
[exit 3]
```
"""


def test_reads_commands_expected_text_and_exit_codes():
    found = [(e.command, e.expected, e.exit_code) for e in docs_check.read_examples(PAGE)]
    assert found == [
        ("echo one; echo two", "one\ntwo", 0),
        ("echo a b | tr a c", "c b", 0),
        ("echo nine 12.3 s; exit 3", "nine ... s", 3),
    ]


def test_true_examples_pass_and_false_ones_are_shown(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    assert docs_check.check_file(page) == (3, 0)
    page.write_text(PAGE.replace("c b\n", "c d\n"))
    assert docs_check.check_file(page) == (3, 1)
    assert "+c b" in capsys.readouterr().out


def test_dots_stand_for_anything_and_rules_for_any_length():
    assert docs_check.matches("a\n...\nz", "a\nb\nc\nz")
    assert docs_check.matches("step ... s   x", "step 1.25 s x  ")
    assert docs_check.matches("───", "─────────")
    assert not docs_check.matches("a ... z", "a b c")


def test_broken_links_are_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("[here](page.md) [there](no.md#part) [web](https://example.org/x)")
    assert [line.endswith("no.md, which does not exist") for line in docs_check.check_links(page)] == [True]
