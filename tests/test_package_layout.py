"""The package as built: which folders it takes along, what importing it costs, what stands beside it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import networkx as nx
import pytest

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
# A folder imports from those before it; passes and runtime read plans, and know nothing of the planner.
FLOORS = (
    "kernels",
    "profiler",
    "ops",
    "costmodel",
    "schedules",
    "plans",
    "planner",
    "passes",
    "runtime",
    "shardwright",
)
WITHIN_PLANNER = ("interfaces", "solver", "space", "sharding", "stages", "memory", "lengths", "search", "report")
OPEN_TO_ALL = {"errors", "units"}

pytestmark = pytest.mark.skipif(not (ROOT / "pyproject.toml").is_file(), reason="needs the source tree")


def python_files() -> list[Path]:
    return [path for folder in FLOORS for path in sorted((ROOT / folder).rglob("*.py"))]


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
        for folder in FLOORS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc") and "__pycache__" not in path.parts
    }
    assert others == packaged


def imports_of(path: Path) -> set[str]:
    """Modules of ours that a file imports, as 'profiler.graph': at its top, inside functions, for types alone."""
    package = _inside(path) if path.name == "__init__.py" else _inside(path)[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom):
            continue
        if not node.level:
            assert node.module is None or node.module.split(".")[0] != "shardwright", f"{path}: absolute import of ours"
            continue
        base = (*package[: len(package) - (node.level - 1)], *(node.module.split(".") if node.module else ()))
        for alias in node.names:
            found.add(".".join((*base, alias.name) if (*base, alias.name) in MODULES else base))
    return found


def _inside(path: Path) -> tuple[str, ...]:
    """Parts of a module's name below the installed package, of which every folder but shardwright itself is a part."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "shardwright" else parts
    return parts[:-1] if parts[-1] == "__init__" else parts


MODULES = {_inside(path): path for path in python_files()}


def _floor(module: str) -> str:
    first = module.split(".")[0]
    return first if first in FLOORS else "shardwright"


@pytest.mark.parametrize("floor", FLOORS[:-1])
def test_a_folder_imports_only_from_those_before_it(floor):
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    if floor in ("passes", "runtime"):
        allowed = tuple(name for name in allowed if name != "planner")
    wrong = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in sorted((ROOT / floor).rglob("*.py"))
        for module in imports_of(path)
        if _floor(module) not in allowed and module not in OPEN_TO_ALL
    }
    assert not wrong


def test_no_folder_of_the_planner_imports_from_a_later_one():
    wrong = set()
    for path in sorted((ROOT / "planner").rglob("*.py")):
        own = _inside(path)[1:]
        for module in imports_of(path):
            other = module.split(".")[1:]
            if own and module.startswith("planner.") and WITHIN_PLANNER.index(own[0]) < WITHIN_PLANNER.index(other[0]):
                wrong.add(f"{path.relative_to(ROOT)}: {module}")
    assert not wrong


def test_no_modules_import_each_other_in_a_circle():
    graph = nx.DiGraph()
    for name, path in MODULES.items():
        graph.add_edges_from((".".join(name), module) for module in imports_of(path) if module)
    circles = [sorted(names) for names in nx.strongly_connected_components(graph) if len(names) > 1]
    assert not circles


def test_axes_are_named_in_one_place():
    """Code asks for axes of a kind (plans/axes.py), so that one more axis is one more role."""
    pair, wrong = {"dp", "tp"}, []
    for path in python_files():
        if path.relative_to(ROOT).as_posix() == "plans/axes.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            named = (
                [node.value] if isinstance(node, ast.Constant)
                else [node.attr] if isinstance(node, ast.Attribute)
                else [node.arg] if isinstance(node, (ast.arg, ast.keyword))
                else [node.id] if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
                else []
            )  # fmt: skip
            wrong += [f"{path.relative_to(ROOT)}:{node.lineno}" for name in named if name in pair]
    assert not wrong


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


# Called by transformers with the arguments of its own attention and mask functions.
CALLED_BY_TRANSFORMERS = {"attention_forward", "make_mask", "_eager"}


def counted_parameters(function: ast.FunctionDef, public: bool) -> list[str]:
    """Not counted: self; the tensors of an op, which its schema lists; what Triton compiles; the options of a public
    function, each with its name and default."""
    if function.name in CALLED_BY_TRANSFORMERS or any("triton.jit" in ast.unparse(d) for d in function.decorator_list):
        return []
    given = function.args
    parameters = [*given.posonlyargs, *given.args, *([] if public else given.kwonlyargs)]
    types = {one.arg: ast.unparse(one.annotation) if one.annotation else "" for one in parameters}
    return [name for name, kind in types.items() if name not in ("self", "cls") and not kind.startswith("torch.Tensor")]


def test_no_function_has_over_100_lines_or_over_8_parameters():
    import shardwright

    wrong = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = node.end_lineno - node.lineno + 1
                parameters = counted_parameters(node, node.name in shardwright.__all__)
                if lines > 100 or len(parameters) > 8:
                    wrong.append(f"{path.relative_to(ROOT)}: {node.name}, {lines} lines, {len(parameters)} parameters")
    assert not wrong


def test_only_the_cost_model_and_the_profiler_read_the_rates_of_hardware():
    """What seconds they make, and what they compare, is for the cost model to say."""
    rates = ("bytes_per_s", "memory_bytes_per_s", "peak_flops_per_s")
    others = [path for path in python_files() if path.relative_to(ROOT).parts[0] not in ("costmodel", "profiler")]
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"
        for path in others
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in rates
    ]
    assert not wrong


def test_slots_of_joint_graphs_are_named_and_read_in_one_module():
    kinds = "param|buffer|input|tangent|output|update|param_grad|input_grad"
    spelled = re.compile(rf"f?[\"'](?:{kinds})_(?:[\"']|\{{)")
    wrong = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in python_files()
        if path.name != "slots.py"
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if spelled.search(line)
    ]
    assert not wrong


def test_the_page_of_the_architecture_names_what_is_there_and_every_folder():
    text = (ROOT / "docs" / "architecture.md").read_text()
    named = set(re.findall(r"`([\w/.*]+(?:\.py|\.toml|\.json|/))`", text))
    folders = {path.parent.relative_to(ROOT) for path in python_files()}
    for name in named:
        assert any(list((ROOT / folder).glob(name)) for folder in {Path(), *folders}), name
    for folder in map(Path.as_posix, folders):
        assert f"`{folder}/`" in text or f"`{folder.partition('/')[2]}/`" in text or f"`{Path(folder).name}/`" in text
