"""The KServe v2 protocol with Triton's binary extension, as far as a PyTriton client speaks it over HTTP.

A body is JSON, followed by the raw data of those tensors whose ``parameters`` give a ``binary_data_size``;
the header ``Inference-Header-Content-Length`` says where the JSON ends.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nemotron4.errors import RequestError

LENGTH_HEADER = "Inference-Header-Content-Length"
_FORMATS = {"BOOL": "?", "INT32": "i", "INT64": "q", "FP32": "f"}


@dataclass(frozen=True)
class Tensor:
    """Row-major values; BYTES elements are ``bytes``."""

    datatype: str
    shape: tuple[int, ...]
    values: Sequence[Any]


def read_request(body: bytes, json_length: int | None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The request object and its inputs by name. RequestError for anything malformed."""
    end = len(body) if json_length is None else json_length
    if not 0 < end <= len(body):
        raise RequestError(f"{LENGTH_HEADER} is {json_length}; the body has {len(body)} bytes")
    try:
        request = json.loads(body[:end])
        inputs = list(request["inputs"])
        found, position = {}, end
        for entry in inputs:
            size = (entry.get("parameters") or {}).get("binary_data_size")
            data = None if size is None else body[position : position + size]
            position += size or 0
            found[str(entry["name"])] = _tensor(entry, data)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise RequestError(f"not a KServe v2 inference request: {error!r}") from error
    if position != len(body):
        raise RequestError(f"the inputs describe {position} bytes; the body has {len(body)}")
    return request, found


def _tensor(entry: Mapping[str, Any], data: bytes | None) -> Tensor:
    name, datatype = entry["name"], entry["datatype"]
    shape = tuple(int(n) for n in entry["shape"])
    count = math.prod(shape)
    if datatype != "BYTES" and datatype not in _FORMATS:
        raise RequestError(f"input {name!r} has datatype {datatype!r}; expected BYTES, {', '.join(_FORMATS)}")
    if data is None:
        values = _flat(entry["data"])
        if datatype == "BYTES":
            values = [value.encode() if isinstance(value, str) else value for value in values]
    elif datatype == "BYTES":
        values = _byte_strings(data)
    else:
        values = list(struct.unpack(f"<{count}{_FORMATS[datatype]}", data))
    if len(values) != count or min(shape, default=0) < 1:
        raise RequestError(f"input {name!r} has {len(values)} values; shape {list(shape)} needs {count}")
    return Tensor(datatype, shape, values)


def _flat(data: Any) -> list[Any]:
    return [value for item in data for value in _flat(item)] if isinstance(data, list) else [data]


def _byte_strings(data: bytes) -> list[bytes]:
    """Each element is its length in four little-endian bytes and its bytes."""
    values, at = [], 0
    while at < len(data):
        (length,) = struct.unpack_from("<I", data, at)
        values.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    if at != len(data):
        raise RequestError("the binary data of a BYTES input is cut short")
    return values


def write_response(
    request: Mapping[str, Any], model: str, outputs: Mapping[str, Tensor]
) -> tuple[bytes, dict[str, str]]:
    """Body and headers: the asked outputs (all, if none is named), binary where the request wants it."""
    asked = {entry["name"]: entry.get("parameters") or {} for entry in request.get("outputs") or []}
    unknown = asked.keys() - outputs.keys()
    if unknown:
        raise RequestError(f"output {sorted(unknown)[0]!r} is unknown; known: {', '.join(outputs)}")
    default = bool((request.get("parameters") or {}).get("binary_data_output", False))
    entries, blobs = [], []
    for name, tensor in outputs.items():
        if asked and name not in asked:
            continue
        entry: dict[str, Any] = {"name": name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if asked.get(name, {}).get("binary_data", default):
            blob = struct.pack(f"<{len(tensor.values)}{_FORMATS[tensor.datatype]}", *tensor.values)
            entry["parameters"] = {"binary_data_size": len(blob)}
            blobs.append(blob)
        else:
            entry["data"] = list(tensor.values)
        entries.append(entry)
    answer = {"model_name": model, "model_version": "1", "outputs": entries}
    if "id" in request:
        answer["id"] = request["id"]
    text = json.dumps(answer).encode()
    if not blobs:
        return text, {"Content-Type": "application/json"}
    headers = {"Content-Type": "application/octet-stream", LENGTH_HEADER: str(len(text))}
    return b"".join([text, *blobs]), headers
