"""Tensors of PyTorch's own files, read without unpickling code: ``torch_dist`` checkpoints, ``torch.save``.

``.metadata`` is a pickle of a few torch classes; it is read by an unpickler that knows their names and
builds inert stand-ins, and refuses every other name. A ``.distcp`` file is a row of pieces; a tensor
piece is a ``torch.save`` zip whose small ``data.pkl`` gives the layout (same unpickler) and whose one
storage holds the raw values, which are read at their offset.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from nemotron4.checkpoint.nemo_files import NemoFiles, NemoTensor, StoredChunk
from nemotron4.errors import CheckpointError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORAGES = {"BFloat16Storage": "bfloat16", "HalfStorage": "float16", "FloatStorage": "float32"}
METADATA = ".metadata"


class _Name:
    """An admitted name with its arguments or fields, none of its behaviour."""

    fields: Any = None

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        self.fields = state

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


class _Metadata(_Name):
    pass


class _TensorMetadata(_Name):
    pass


class _BytesMetadata(_Name):
    pass


_DCP = "torch.distributed.checkpoint"
_INDEX_NAMES: dict[tuple[str, str], Any] = {
    (f"{_DCP}.metadata", "Metadata"): _Metadata,
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreMetadata"): _Metadata,
    (f"{_DCP}.metadata", "TensorStorageMetadata"): _TensorMetadata,
    (f"{_DCP}.metadata", "BytesStorageMetadata"): _BytesMetadata,
    (f"{_DCP}.metadata", "TensorProperties"): _Name,
    (f"{_DCP}.metadata", "ChunkStorageMetadata"): _Name,
    (f"{_DCP}.metadata", "MetadataIndex"): _Name,
    (f"{_DCP}.metadata", "StorageMeta"): _Name,
    (f"{_DCP}.metadata", "_MEM_FORMAT_ENCODING"): _Name,
    (f"{_DCP}.filesystem", "_StorageInfo"): _Name,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): _Name,
    ("pathlib", "PosixPath"): _Name,
    ("pathlib._local", "PosixPath"): _Name,
    ("collections", "OrderedDict"): OrderedDict,
}
PIECE_NAMES: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Name,
    ("collections", "OrderedDict"): OrderedDict,
    **{("torch", name): name for name in STORAGES},
}


class _Unpickler(pickle.Unpickler):
    """Builds plain containers and the admitted stand-ins; anything else is refused by name."""

    def __init__(self, data: bytes, names: Mapping[tuple[str, str], Any], where: str) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self._names:
            return self._names[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return name
        raise CheckpointError(
            f"{self._where}: the pickle asks for {module}.{name}; refused",
            hint="only the index classes of torch.distributed.checkpoint are read; do not trust this file",
        )

    def persistent_load(self, pid: Any) -> Any:
        return pid


def read_inert(data: bytes, names: Mapping[tuple[str, str], Any], where: str) -> Any:
    """The objects of a pickle as plain containers and stand-ins for the admitted names."""
    try:
        return _Unpickler(data, names, where).load()
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile pickle can raise anything
        raise CheckpointError(f"{where}: cannot be read: {type(error).__name__}: {error}") from error


def read_torch_dist_index(files: NemoFiles, folder: str) -> Mapping[str, NemoTensor]:
    """Every tensor of ``<folder>/.metadata``; byte entries (extra states) are never opened."""
    name = f"{folder}/{METADATA}" if folder else METADATA
    where = f"{files.source}: {name}"
    metadata = read_inert(files.read(name, limit_bytes=1024**3), _INDEX_NAMES, where)
    try:
        if not isinstance(metadata, _Metadata):
            raise TypeError("the top object is not Metadata")
        places = {
            (index.fields["fqn"], tuple(index.fields.get("offset") or ())): info.fields
            for index, info in metadata.fields["storage_data"].items()
        }
        entries = {
            key: entry.fields
            for key, entry in metadata.fields["state_dict_metadata"].items()
            if isinstance(entry, _TensorMetadata)
        }
        return {
            key: _tensor(files, folder, key, entry, places)
            for key, entry in entries.items()
            if entry["properties"].fields[0] in DTYPES
        }
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{where}: not a torch.distributed.checkpoint index: {error!r}") from error


def _tensor(
    files: NemoFiles,
    folder: str,
    key: str,
    entry: Mapping[str, Any],
    places: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]],
) -> NemoTensor:
    shape = tuple(map(int, entry["size"]))
    dtype_name = entry["properties"].fields[0]
    dtype = DTYPES[dtype_name]
    chunks = []
    for stored in entry["chunks"]:
        start = tuple(map(int, stored.fields["offsets"]))
        sizes = tuple(map(int, stored.fields["sizes"]))
        place = places.get((key, start))
        if place is None:
            raise CheckpointError(f"{files.source}: {key}: the chunk at {list(start)} is missing")
        file = place["relative_path"]
        if "/" in file or file in ("", ".", ".."):
            raise CheckpointError(f"{files.source}: {key}: chunk file {file!r} is not a plain name; refused")
        path = f"{folder}/{file}" if folder else file
        if place.get("transform_descriptors"):
            raise CheckpointError(f"{files.source}: {key}: transformed (compressed) pieces are not read")
        offset = _values_offset(files, path, place["offset"], place["length"], sizes, dtype_name, key)
        chunks.append(StoredChunk(start, sizes, sizes, path, offset))
    covered = sum(math.prod(chunk.shape) for chunk in chunks)
    inside = all(
        s >= 0 and s + n <= size
        for chunk in chunks
        for s, n, size in zip(chunk.start, chunk.shape, shape, strict=True)
    )
    if covered != math.prod(shape) or not inside or len({chunk.start for chunk in chunks}) != len(chunks):
        raise CheckpointError(
            f"{files.source}: {key}: the chunks hold {covered} values; "
            f"shape {list(shape)} needs {math.prod(shape)}"
        )
    return NemoTensor(key, shape, dtype, tuple(chunks))


class FilePiece(io.RawIOBase):
    """A byte range of one file as a seekable stream, for zipfile."""

    def __init__(self, files: NemoFiles, name: str, offset: int, length: int) -> None:
        super().__init__()
        self._files, self._name, self._offset, self._length = files, name, offset, length
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        self._position = max(0, base + position)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer)
        count = max(0, min(len(view), self._length - self._position))
        if count:
            self._files.read_into(self._name, self._offset + self._position, view[:count])
        self._position += count
        return count


def _values_offset(
    files: NemoFiles, name: str, offset: int, length: int, sizes: tuple[int, ...], dtype_name: str, key: str
) -> int:
    """Byte offset in the file of the piece's values, after its layout has been checked."""
    where = f"{files.source}: {name}: {key}"
    if offset < 0 or length <= 0 or offset + length > files.size(name):
        raise CheckpointError(
            f"{where}: the piece at {offset} + {length} is outside the file ({files.size(name)} bytes)",
            hint="the file is cut short; copy or download it again",
        )
    try:
        with zipfile.ZipFile(io.BufferedReader(FilePiece(files, name, offset, length))) as archive:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            layout = archive.read(members["data.pkl"])
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CheckpointError(f"{where}: big-endian values are not read")
            values = members["data/0"]
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{where}: the piece is not a torch.save file: {error}") from error
    piece = read_inert(layout, PIECE_NAMES, where)
    try:
        storage, first = piece.arguments[0][1], piece.arguments[1]
        shape, strides = tuple(piece.arguments[2]), tuple(piece.arguments[3])
    except (AttributeError, ValueError, TypeError, IndexError) as error:
        raise CheckpointError(f"{where}: the piece holds no plain tensor") from error
    expected = math.prod(sizes) * DTYPES[dtype_name].itemsize
    contiguous = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    is_contiguous = all(
        n == 1 or have == want for n, have, want in zip(shape, strides, contiguous, strict=True)
    )
    if STORAGES.get(storage) != dtype_name or shape != sizes or not is_contiguous or first != 0:
        raise CheckpointError(
            f"{where}: the piece is {storage} {list(shape)} with strides {list(strides)}; "
            f"expected contiguous {dtype_name} {list(sizes)}"
        )
    if values.compress_type != zipfile.ZIP_STORED or values.file_size < expected:
        raise CheckpointError(f"{where}: the piece has {values.file_size} bytes; expected {expected}")
    header = bytearray(30)
    files.read_into(name, offset + values.header_offset, memoryview(header))
    name_length, extra_length = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    return offset + values.header_offset + 30 + name_length + extra_length


def read_ckpt(files: NemoFiles, name: str) -> dict[str, torch.Tensor]:
    """Every tensor of a flat state dict, in memory. Anything else in it is an error."""
    where = f"{files.source}: {name}"
    try:
        stream = io.BufferedReader(FilePiece(files, name, 0, files.size(name)))
        with zipfile.ZipFile(stream) as archive:
            members = {info.filename.split("/", 1)[-1]: info for info in archive.infolist()}
            if "byteorder" in members and archive.read(members["byteorder"]) != b"little":
                raise CheckpointError(f"{where}: big-endian values are not read")
            state = read_inert(archive.read(members["data.pkl"]), PIECE_NAMES, where)
            if not isinstance(state, Mapping):
                raise CheckpointError(f"{where}: holds {type(state).__name__}; expected a state dict")
            return {
                str(key): _ckpt_tensor(archive, members, entry, f"{where}: {key}")
                for key, entry in state.items()
            }
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{where}: not a torch.save file: {error}") from error


def _ckpt_tensor(
    archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo], entry: Any, where: str
) -> torch.Tensor:
    try:
        (_, storage, key, *_), offset, shape, strides = entry.arguments[:4]
        dtype = DTYPES[STORAGES[storage]]
        data = members[f"data/{key}"]
        sizes, steps = tuple(map(int, shape)), tuple(map(int, strides))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: not a plain tensor of floats") from error
    values = torch.frombuffer(bytearray(archive.read(data)), dtype=dtype)
    last = offset + sum((n - 1) * step for n, step in zip(sizes, steps, strict=True))
    if min((offset, *sizes, *steps), default=0) < 0 or (math.prod(sizes) and last >= len(values)):
        raise CheckpointError(f"{where}: shape {list(sizes)} does not lie inside {len(values)} values")
    return values.as_strided(sizes, steps, offset).clone()
