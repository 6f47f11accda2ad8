"""The tensors of a ``torch.save`` file (``model_weights.ckpt``), read without running its pickle.

The file is a zip: a small ``data.pkl`` lays the tensors out over storages, which are raw values in members of
their own. The layout is read by the inert unpickler of ``nemo_torch_dist``.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from nemotron4.checkpoint.nemo_files import NemoFiles
from nemotron4.checkpoint.nemo_torch_dist import DTYPES, PIECE_NAMES, STORAGES, FilePiece, read_inert
from nemotron4.errors import CheckpointError


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
                str(key): _tensor(archive, members, entry, f"{where}: {key}") for key, entry in state.items()
            }
    except (zipfile.BadZipFile, KeyError, NotImplementedError) as error:
        raise CheckpointError(f"{where}: not a torch.save file: {error}") from error


def _tensor(
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
