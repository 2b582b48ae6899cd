"""A user's own factory: "package.module:name" or "path/to/file.py:name"."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from ..errors import ExitCode, ShardwrightError
from .calling import take_apart
from .near import near_matches
from .workload import Workload


def call_factory(spec: str) -> Workload | tuple[nn.Module, Any]:
    """Import the module, call the function, and look at what comes back.

    Raises ShardwrightError where there is no such module or function, where it fails, and where it returns anything but
    a Workload or (module, batch).
    """
    where, _, name = spec.rpartition(":")
    module = _import(where, spec)
    factory = getattr(module, name, None)
    if factory is None:
        names = [n for n, value in vars(module).items() if callable(value) and not n.startswith("_")]
        raise ShardwrightError(
            f"{where} has no {name!r}",
            means="near matches: " + (", ".join(near_matches(name, names)) or "none"),
            change="MODEL",
            works=f"{where}:{(near_matches(name, names) or ['my_factory'])[0]}",
        )
    try:
        made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    except ShardwrightError:
        raise
    except Exception as error:
        raise ShardwrightError(
            f"{spec} failed: {type(error).__name__}: {error}",
            means=f"raised at {_last_place(error)}" if not _needs_arguments(factory) else "it takes required arguments",
            change="the factory; it is called without arguments",
            works="def factory() -> Workload",
        ) from error
    return _checked(made, spec)


def _checked(made: Any, spec: str) -> Workload | tuple[nn.Module, Any]:
    if isinstance(made, Workload):
        return made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        if take_apart(made[1])[0]:
            return made
        problem = "its batch holds no tensor"
    elif isinstance(made, nn.Module):
        problem = "it returned a module without example inputs"
    else:
        problem = f"it returned {type(made).__name__}"
    raise ShardwrightError(
        f"{spec}: {problem}",
        means="capture needs the shapes and dtypes of a batch",
        change="what the factory returns",
        works="return model, {'input_ids': torch.zeros(2, 128, dtype=torch.int64), 'labels': ...}",
        exit_code=ExitCode.USAGE,
    )


def _import(where: str, spec: str) -> ModuleType:
    if where.endswith(".py") or "/" in where or "\\" in where:
        return _import_file(Path(where).expanduser(), spec)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: the user's own folder counts
    try:
        return importlib.import_module(where)
    except ImportError as error:
        missing = getattr(error, "name", None)
        ours = missing is not None and (where == missing or where.startswith(missing + "."))
        raise ShardwrightError(
            f"cannot import {where}: {error}",
            means=f"no module of that name is found from {Path.cwd()}"
            if ours
            else "the module itself failed to import",
            change="MODEL, or the folder you run in",
            works="package.module:factory, path/to/file.py:factory, preset:llama-3-8b, or hf:path/to/config.json",
        ) from error
    except Exception as error:
        raise _failed_import(where, error) from error


def _import_file(path: Path, spec: str) -> ModuleType:
    if not path.is_file():
        raise ShardwrightError(f"{path} does not exist", change="MODEL", works="path/to/file.py:factory")
    # a name of its own for each path, so that classes can be pickled and two files of one name do not meet
    name = f"_shardwright_user_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(name, path)
    if found is None or found.loader is None:
        raise ShardwrightError(f"{path} is not a Python file", change="MODEL", works="path/to/file.py:factory")
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # its neighbours are found, as when it is run
    try:
        found.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise _failed_import(str(path), error) from error
    finally:
        if folder in sys.path:
            sys.path.remove(folder)
    return module


def _failed_import(where: str, error: Exception) -> ShardwrightError:
    return ShardwrightError(
        f"{where} failed to import: {type(error).__name__}: {error}",
        means=f"raised at {_last_place(error)}",
        change="that file",
        works=f"a module for which `python -c 'import {Path(where).stem}'` succeeds",
    )


def _last_place(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "an unknown place"


def _needs_arguments(factory: Any) -> bool:
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):
        return False
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return any(p.default is inspect.Parameter.empty and p.kind not in kinds for p in parameters)
