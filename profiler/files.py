"""Writing a file whole or not at all."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def replace_text(path: Path, text: str) -> None:
    """Written under another name and then renamed: what a file holds is never lost. Through a link, to what it names;
    a device or a pipe is written to, never replaced. A file that is there keeps its permissions."""
    path = path.resolve()
    if path.exists() and not path.is_file():
        path.write_text(text)
        return
    fd, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name[:32], suffix=".tmp")
    try:
        with os.fdopen(fd, "w") as file:
            file.write(text)
        os.chmod(temporary, _mode(path))
        os.replace(temporary, path)
    except BaseException:  # an interrupt too leaves nothing beside the file
        Path(temporary).unlink(missing_ok=True)
        raise


def _mode(path: Path) -> int:
    """Of the file, or what a new one would get."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
