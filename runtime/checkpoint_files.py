"""What is believed of a checkpoint folder before a value is read: checksums of its files, and an index without code.

DCP keeps its index in a pickle, and a pickle may call anything that Python can import. Here it is read by an unpickler
that knows the classes that DCP writes and refuses every other name.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from ..errors import ExitCode, ShardwrightError
from ._torch import DCP_INDEX_NAME, MemoryFormatName, StorageInfo, layout_of_name

_BLOCK_BYTES = 4 << 20
_CLASSES = {
    (cls.__module__, cls.__qualname__): cls
    for cls in (
        ChunkStorageMetadata, MemoryFormatName, Metadata, MetadataIndex, StorageInfo, StorageMeta, TensorProperties,
        TensorStorageMetadata,
    )
}  # fmt: skip
_PATHS = {"PosixPath": pathlib.PurePosixPath, "WindowsPath": pathlib.PureWindowsPath}


class _IndexUnpickler(pickle.Unpickler):
    """Knows the names that DCP's index is made of, and no other."""

    def find_class(self, module: str, name: str) -> Any:
        found: Any = _CLASSES.get((module, name))
        if found is None and module.partition(".")[0] == "pathlib":  # its classes moved in Python 3.13
            found = _PATHS.get(name)
        if found is None and module == "torch":
            found = torch.Size if name == "Size" else getattr(torch, name, None)
            found = found if found is torch.Size or isinstance(found, torch.dtype) else None
        if found is None and (module, name) == (layout_of_name.__module__, layout_of_name.__name__):
            found = layout_of_name
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint has")
        return found

    def persistent_load(self, key: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


class SafeReader(FileSystemReader):
    """DCP's reader of a folder whose index is read without running code, and names files of this folder alone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        folder = Path(self.path)
        metadata = read_index(folder)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_index(folder: Path) -> Metadata:
    """DCP's index of a checkpoint. Raises ShardwrightError where it is damaged or could do anything but describe."""
    path = folder / DCP_INDEX_NAME
    try:
        with path.open("rb") as file:
            metadata = _IndexUnpickler(file).load()
    except OSError as error:
        raise damaged(folder, f"{path.name}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise whatever the classes in it raise
        raise damaged(folder, f"{path.name}: {error or type(error).__name__}") from None
    problem = _problem_of(metadata, folder)
    if problem:
        raise damaged(folder, f"{path.name}: {problem}")
    return metadata


def _problem_of(metadata: Any, folder: Path) -> str:
    if not isinstance(metadata, Metadata):
        return f"it holds {type(metadata).__name__}, not an index"
    if not isinstance(metadata.state_dict_metadata, dict) or not isinstance(metadata.storage_data, dict):
        return "it lists no tensors"
    for index, info in metadata.storage_data.items():
        if not isinstance(index, MetadataIndex) or not isinstance(info, StorageInfo):
            return "it has an entry that is no place in a file"
        name = info.relative_path
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            return f"{index.fqn} lies in {name!r}, outside the folder"
        if getattr(info, "transform_descriptors", None):
            return f"{index.fqn} is stored in an encoding that is not read"
        path = folder / name
        size = path.stat().st_size if path.is_file() else -1
        numbers = (info.offset, info.length)
        if not all(type(n) is int and n >= 0 for n in numbers) or info.offset + info.length > size:
            return f"{index.fqn} lies at bytes {info.offset} to {info.offset}+{info.length} of {name}, which has {size}"
    return ""


def digests(folder: Path, rank: int, num_ranks: int) -> dict[str, str]:
    """SHA-256 of this rank's share of the folder's files, by name; the document itself is left out."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".json")
    return {name: _sha256(folder / name) for name in names[rank::num_ranks]}


def _sha256(path: Path) -> str:
    found = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            found.update(block)
    return found.hexdigest()


def document_digest(document: Mapping[str, Any]) -> str:
    """Of everything in program.json but the digest itself."""
    rest = {key: value for key, value in document.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def first_difference(folder: Path, expected: Mapping[str, str], rank: int, num_ranks: int) -> str:
    """What is wrong with this rank's share of the files; '' where every one is as it was written."""
    for name in sorted(expected)[rank::num_ranks]:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        try:
            found = _sha256(path)
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != expected[name]:
            return (
                f"{name} is not as it was written (SHA-256 {found[:12]}..., written as {str(expected[name])[:12]}...)"
            )
    return ""


def damaged(folder: Path, what: str) -> ShardwrightError:
    return ShardwrightError(
        f"the checkpoint {folder} is damaged: {what}",
        means="nothing was loaded; the program is as it was",
        change="the path, or bring the folder's files from where they are whole",
        works="an earlier checkpoint",
        exit_code=ExitCode.PLAN_MISMATCH,
    )
