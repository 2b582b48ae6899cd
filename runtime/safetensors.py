"""Whole-model safetensors files, read by slices: no rank holds more of a tensor than its shard."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..errors import ShardwrightError
from .checkpoint_files import damaged, first_difference

_SUMS = "SHA256SUMS"


class LazyTensor:
    """Stands for a tensor in a file; indexing by slices reads just that part."""

    def __init__(self, file: Any, key: str) -> None:
        self._file, self._key = file, key
        self._slice = file.get_slice(key)
        self.shape = tuple(self._slice.get_shape())

    def __getitem__(self, index: tuple[slice, ...]) -> torch.Tensor:
        if not self.shape:
            return self._file.get_tensor(self._key)
        sizes = [range(*part.indices(size)) for part, size in zip(index, self.shape, strict=True)]
        if not all(len(size) for size in sizes):
            return torch.empty([len(size) for size in sizes])
        return self._slice[index]


def open_safetensors(
    path: str | Path,
    files: ExitStack,
    shapes: Mapping[str, Sequence[int]],
    tied: Mapping[str, str] | None = None,
    optional: Collection[str] = (),
) -> dict[str, LazyTensor]:
    """Name -> lazy tensor, for each name of `shapes` found in a file, or in all *.safetensors of a folder. files: keeps
    them open.

    tied: other names that tensors may go by. A file may carry or lack the name of the model's outer module ("model."),
    as transformers' files do. Raises ShardwrightError where a file is damaged, a tensor has another shape, or one that
    is not optional is missing.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    paths = _files_at(path)
    aliases: dict[str, list[str]] = {}
    for other, name in (tied or {}).items():
        aliases.setdefault(name, []).append(other)
    where: dict[str, Any] = {}
    for file in paths:
        try:
            opened = files.enter_context(safe_open(str(file), framework="pt"))
        except (SafetensorError, OSError) as error:
            raise ShardwrightError(
                f"cannot read {file}: {error}",
                means="it is damaged, cut short, or no safetensors file; nothing was loaded",
                change="the path",
                works="the file as its author published it",
            ) from None
        where.update(dict.fromkeys(opened.keys(), opened))
    found = {name: _key_of([name, *aliases.get(name, [])], where) for name in shapes}
    missing = sorted(name for name, key in found.items() if key is None and name not in optional)
    if missing:
        raise ShardwrightError(
            f"{path} lacks {len(missing)} of {len(found)} tensors, first {', '.join(missing[:3])}",
            means=f"it has {len(where)} tensors, such as {', '.join(sorted(where)[:2])}: those of another model",
            change="the path",
            works="the file that the model's own library saves",
        )
    tensors = {name: LazyTensor(where[key], key) for name, key in found.items() if key is not None}
    for name, tensor in tensors.items():
        if tensor.shape != tuple(shapes[name]):
            raise ShardwrightError(
                f"{name} has shape {tensor.shape} in {path}; this model has {tuple(shapes[name])}",
                means="the file is of a model of another size; nothing was loaded",
                change="the path",
                works="the file of a model with this configuration",
            )
    return tensors


def _files_at(path: Path) -> list[Path]:
    paths = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not paths or not all(file.is_file() for file in paths):
        raise ShardwrightError(
            f"no safetensors at {path}", change="the path", works="a .safetensors file, or a folder that holds some"
        )
    return paths


def verify_sums(path: Path, rank: int, num_ranks: int) -> None:
    """Compare the files with the checksums in a SHA256SUMS beside them, as sha256sum writes it, where there is one;
    the ranks share the reading. Of files that it does not name nothing is known, and they are taken as they are. Raises
    ShardwrightError where one differs."""
    paths = _files_at(path)
    folder = paths[0].parent
    if not (folder / _SUMS).is_file():
        return
    lines = (folder / _SUMS).read_text(errors="replace").splitlines()
    split = (line.partition(" ") for line in lines)
    # "*" marks a file read as binary; "./" is how `sha256sum ./*` names those of its own folder
    sums = {name.strip().removeprefix("*").removeprefix("./"): digest.lower() for digest, _, name in split}
    named = {file.name: sums[file.name] for file in paths if file.name in sums}
    if problem := first_difference(folder, named, rank, num_ranks):
        raise damaged(folder, problem)


def _key_of(names: list[str], keys: Mapping[str, Any]) -> str | None:
    for name in names:
        if name in keys:
            return name
    for name in names:
        if "." in name and (inner := name.split(".", 1)[1]) in keys:
            return inner
        outer = [key for key in keys if key.split(".", 1)[-1] == name]
        if len(outer) == 1:
            return outer[0]
    return None
