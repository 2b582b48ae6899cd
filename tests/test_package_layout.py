"""The package as built: which folders it takes along, what importing it costs, what stands beside it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = ("profiler", "costmodel", "planner", "kernels", "passes", "runtime", "shardwright")
OPEN_TO_ALL = {"errors", "units"}
# What a kernel is called, and how it is sharded, stands with the kernel.
EXCEPTIONS = {"profiler/capture.py: kernels", "planner/sharding/catalog.py: kernels"}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_every_folder_with_code_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    places = {Path(path).as_posix() for path in settings["package-dir"].values()}
    assert set(settings["package-dir"]) == set(settings["packages"])
    assert {path.parent.relative_to(ROOT).as_posix() for path in python_files()} == places


def test_every_data_file_is_packaged():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packaged = {
        path
        for package, patterns in settings["package-data"].items()
        for pattern in patterns
        for path in (ROOT / settings["package-dir"][package]).glob(pattern)
    }
    others = {
        path
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert others == packaged


def imported_folders(path: Path) -> set[str]:
    """Folders that a file imports from by relative imports across folders."""
    package = path.parent.relative_to(ROOT).parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        names = [node.module] if node.module else [alias.name for alias in node.names]
        for name in names:
            # in the installed package every folder but shardwright itself hangs below shardwright
            inside = package[1:] if package[0] == "shardwright" else package
            if node.level and node.level - 1 <= len(inside):
                base = inside[: len(inside) - (node.level - 1)]
                full = (*base, *name.split("."))
                found.add(full[0] if full[0] in FOLDERS[:-1] else f"shardwright.{full[0]}")
            elif not node.level and name.split(".")[0] == "shardwright":
                found.add("absolute import of shardwright")
    return found


@pytest.mark.parametrize("folder", FOLDERS[:-1])
def test_a_folder_imports_only_from_those_before_it(folder):
    allowed = {*FOLDERS[: FOLDERS.index(folder) + 1], *(f"shardwright.{name}" for name in OPEN_TO_ALL)}
    wrong = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for name in imported_folders(path) - allowed
    }
    assert wrong <= EXCEPTIONS


def test_importing_the_package_imports_no_torch():
    code = (
        "import sys, shardwright; dir(shardwright); assert 'torch' not in sys.modules and 'pydantic' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


def test_every_public_name_is_there():
    import shardwright

    for name in shardwright.__all__:
        assert getattr(shardwright, name) is not None
    assert set(shardwright._EXPORTS) == set(shardwright.__all__) - {"__version__"}
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        shardwright.nonsense  # noqa: B018


def test_our_kernels_folder_hides_no_other_package(tmp_path):
    """From the top of a checkout, `import kernels` finds the installed package of that name."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("name = 'the other one'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; assert kernels.name == 'the other one'; " \
           "import shardwright.kernels.ops"  # fmt: skip
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=ROOT)


def test_no_file_names_a_registry_host():
    hosts = ("pypi" + ".org", "download." + "pytorch.org", "files." + "pythonhosted.org")
    names = [
        ROOT / "Makefile",
        ROOT / "pyproject.toml",
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / ".ci/run",
    ]
    for path in [*names, *python_files()]:
        text = path.read_text()
        assert not [host for host in hosts if host in text], path
