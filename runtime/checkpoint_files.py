"""What is believed of a checkpoint folder before a value is read: checksums of its files, and an index without code.

DCP keeps its index in a pickle, and a pickle may call anything that Python can import, and write to what it names. Here
it is read by an unpickler that has a record without behaviour for each class that DCP writes, and refuses every other
name; DCP's own objects are made of the records once every field is what it must be.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

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


class _Closed(type):
    """Of classes that a pickle may name but not write to: BUILD would set attributes on whatever stands before it."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f"it would change what {cls.__name__} is")


class _Record(metaclass=_Closed):
    """Stands in for one of DCP's classes while the index is read: arguments and state, and no behaviour."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...  # whatever the pickle gave

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)
        else:
            self.state = state


def _record(name: str) -> type[_Record]:
    return _Closed(name, (_Record,), {})  # type: ignore[return-value]


_Index, _Place, _Chunk = _record("MetadataIndex"), _record("StorageInfo"), _record("ChunkStorageMetadata")
_Tensor, _Properties, _All = _record("TensorStorageMetadata"), _record("TensorProperties"), _record("Metadata")
_Other = _record("Other")
_STANDS_FOR: dict[tuple[str, str], Any] = {
    (cls.__module__, cls.__qualname__): stand_in
    for cls, stand_in in (
        (ChunkStorageMetadata, _Chunk), (MemoryFormatName, _Other), (Metadata, _All), (MetadataIndex, _Index),
        (StorageInfo, _Place), (StorageMeta, _Other), (TensorProperties, _Properties), (TensorStorageMetadata, _Tensor),
    )
}  # fmt: skip
_STANDS_FOR[(layout_of_name.__module__, layout_of_name.__name__)] = str
_STANDS_FOR[("torch", "Size")] = tuple


class _IndexUnpickler(pickle.Unpickler):
    """Knows the names that DCP's index is made of, gives records for them, and refuses every other name."""

    def find_class(self, module: str, name: str) -> Any:
        found = _STANDS_FOR.get((module, name))
        if found is None and module.partition(".")[0] == "pathlib" and name in ("PosixPath", "WindowsPath"):
            found = _Other  # the folder that it was written to
        if found is None and module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            found = name
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint has")
        return found

    def persistent_load(self, key: Any) -> Any:
        raise pickle.UnpicklingError("it refers to something outside of itself")


class SafeReader(FileSystemReader):
    """DCP's reader of a folder whose index is read without running code, and names files with a checksum alone."""

    def __init__(self, folder: Path, files: Mapping[str, str]) -> None:
        super().__init__(folder)
        self.folder, self.files = folder, files

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_index(self.folder, self.files)
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


def read_index(folder: Path, files: Mapping[str, str]) -> Metadata:
    """DCP's index of a checkpoint. files: those that it may speak of.

    Raises ShardwrightError where it is damaged or could do anything but describe.
    """
    path = folder / DCP_INDEX_NAME
    try:
        with path.open("rb") as file:
            return _metadata_of(_IndexUnpickler(file).load(), folder, files)
    except OSError as error:
        raise damaged(folder, f"{path.name}: {error.strerror}") from None
    except Exception as error:  # a damaged pickle can raise whatever reading it meets
        raise damaged(folder, f"{path.name}: {error or type(error).__name__}") from None


def _metadata_of(read: Any, folder: Path, files: Mapping[str, str]) -> Metadata:
    """DCP's own objects, from records whose every field is of the type that it must be."""
    if type(read) is not _All:
        raise ValueError(f"it holds {type(read).__name__}, not an index")
    tensors: dict[str, Any] = {_text(name): _tensor_of(entry) for name, entry in read.state_dict_metadata.items()}
    places: dict[MetadataIndex, Any] = {}
    for index, place in read.storage_data.items():
        if type(index) is not _Index or type(place) is not _Place:
            raise ValueError("it has an entry that is no place in a file")
        offset = None if index.offset is None else _sizes(index.offset)
        key = MetadataIndex(_text(index.fqn), offset, None if index.index is None else _count(index.index))
        places[key] = _place_of(place, key.fqn, folder, files)
    return Metadata(tensors, planner_data=None, storage_data=places)


def _tensor_of(entry: Any) -> TensorStorageMetadata:
    if type(entry) is not _Tensor or type(entry.properties) is not _Properties:
        raise ValueError("it has an entry that is no tensor")
    dtype = getattr(torch, _text(entry.properties.state[0]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{entry.properties.state[0]!r} is no type of a tensor")
    chunks = [ChunkStorageMetadata(_sizes(chunk.offsets), _sizes(chunk.sizes)) for chunk in entry.chunks]
    return TensorStorageMetadata(TensorProperties(dtype=dtype), _sizes(entry.size), chunks)


def _place_of(place: Any, name: str, folder: Path, files: Mapping[str, str]) -> Any:
    file = _text(place.relative_path)
    if file not in files or Path(file).name != file:
        raise ValueError(f"{name} lies in {file!r}, outside the folder")
    if getattr(place, "transform_descriptors", None):
        raise ValueError(f"{name} is stored in an encoding that is not read")
    start, length, size = _count(place.offset), _count(place.length), (folder / file).stat().st_size
    if start + length > size:
        raise ValueError(f"{name} lies at bytes {start} to {start + length} of {file}, which has {size}")
    return StorageInfo(file, start, length)


def _text(value: Any) -> str:
    if type(value) is not str:
        raise ValueError(f"{type(value).__name__} where a name must stand")
    return value


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} where a count must stand")
    return value


def _sizes(value: Any) -> torch.Size:
    if type(value) is not tuple:
        raise ValueError(f"{type(value).__name__} where a shape must stand")
    return torch.Size([_count(size) for size in value])


def file_names(folder: Path) -> list[str]:
    """What a checkpoint consists of, the document left out."""
    return sorted(path.name for path in folder.iterdir() if path.is_file() and path.suffix != ".json")


def digests(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """SHA-256 of files by name."""
    return {name: _sha256(folder / name) for name in names}


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
