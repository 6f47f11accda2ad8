"""The Triton model ``reward_model`` that NeMo-Aligner's reward server offered, over KServe v2 REST.

Inputs: ``sentences`` (BYTES) or ``tokens`` with ``sequence_lengths`` (INT64), ``add_EOS`` (BOOL; the first
row's value counts for all). Outputs: ``rewards`` (FP32, nine values a row) and ``exceeded`` (INT32, always 0:
input that does not fit the context is refused, because its scores would mean nothing). The protocol has
Triton's binary extension as far as a PyTriton client speaks it over HTTP: a body is JSON, followed by the raw
data of those tensors whose ``parameters`` give a ``binary_data_size``; the header
``Inference-Header-Content-Length`` says where the JSON ends.
"""

from __future__ import annotations

import asyncio
import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from nemotron4.engine import InferenceEngine, RewardScorer
from nemotron4.errors import RequestError
from nemotron4.server.context import ApiError, context_of
from nemotron4.server.reward import score_rows
from nemotron4.server.rows import until_disconnect
from nemotron4.server.settings import Service
from nemotron4.text.answers import encode_text

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
        asked_outputs(request)  # before anything is computed
        found, position = {}, end
        for entry in inputs:
            size = (entry.get("parameters") or {}).get("binary_data_size")
            data = None if size is None else body[position : position + size]
            position += size or 0
            found[str(entry["name"])] = _tensor(entry, data)
    except RecursionError as error:
        raise RequestError("the request nests too deeply") from error
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise RequestError(f"not a KServe v2 inference request: {error!r}") from error
    if position != len(body):
        raise RequestError(f"the inputs describe {position} bytes; the body has {len(body)}")
    return request, found


def _tensor(entry: Mapping[str, Any], data: bytes | None) -> Tensor:
    name, datatype = entry["name"], entry["datatype"]
    shape = tuple(entry["shape"])
    if not all(type(n) is int for n in shape):
        raise RequestError(f"input {name!r} has shape {list(shape)!r:.60}; expected integers")
    count = math.prod(shape)
    if datatype != "BYTES" and datatype not in _FORMATS:
        raise RequestError(f"input {name!r} has datatype {datatype!r}; expected BYTES, {', '.join(_FORMATS)}")
    if data is None:
        values = _flat(entry["data"])
        if datatype == "BYTES":
            values = [value.encode() if isinstance(value, str) else value for value in values]
        wrong = next((value for value in values if not _is_of(datatype, value)), None)
        if wrong is not None:
            raise RequestError(f"input {name!r} holds {wrong!r:.60}; expected values of {datatype}")
    elif datatype == "BYTES":
        values = _byte_strings(data)
    else:
        values = list(struct.unpack(f"<{count}{_FORMATS[datatype]}", data))
    if len(values) != count or min(shape, default=0) < 1:
        raise RequestError(f"input {name!r} has {len(values)} values; shape {list(shape)} needs {count}")
    return Tensor(datatype, shape, values)


def _is_of(datatype: str, value: object) -> bool:
    """JSON has fewer types: a BOOL may be 0 or 1, and a text is no number."""
    if datatype == "BYTES":
        return isinstance(value, bytes)
    if datatype == "BOOL":
        return value in (True, False)
    return type(value) is int or (datatype == "FP32" and type(value) is float)


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


def asked_outputs(request: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], bool]:
    """Names and parameters of the outputs that are asked for, and whether they are binary by default."""
    asked = {str(each["name"]): dict(each.get("parameters") or {}) for each in request.get("outputs") or []}
    return asked, bool(dict(request.get("parameters") or {}).get("binary_data_output", False))


def write_response(
    request: Mapping[str, Any], model: str, outputs: Mapping[str, Tensor]
) -> tuple[bytes, dict[str, str]]:
    """Body and headers: the asked outputs (all, if none is named), binary where the request wants it."""
    asked, default = asked_outputs(request)
    unknown = asked.keys() - outputs.keys()
    if unknown:
        raise RequestError(f"output {sorted(unknown)[0]!r} is unknown; known: {', '.join(outputs)}")
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


MODEL = "reward_model"
NUM_ATTRIBUTES = 9
MAX_BATCH = 128
INPUTS = {"sentences": "BYTES", "tokens": "INT64", "sequence_lengths": "INT64", "add_EOS": "BOOL"}
WIDTHS = {"sentences": 1, "tokens": -1, "sequence_lengths": -1, "add_EOS": 1}
TRITON_TYPES = {"BYTES": "TYPE_STRING", "INT64": "TYPE_INT64", "BOOL": "TYPE_BOOL"}
PATHS = tuple(f"/v2/models/{MODEL}{version}" for version in ("", "/versions/1"))


def kserve_routes(service: Service, scorer: RewardScorer) -> APIRouter:
    router = APIRouter()

    async def get_ready() -> Response:
        """The server runs and the model is loaded: the port is closed until then."""
        return Response(status_code=200)

    async def get_metadata() -> dict[str, Any]:
        """Names, types and shapes; -1 is any size."""
        inputs = [
            {"name": name, "datatype": kind, "shape": [-1, WIDTHS[name]]} for name, kind in INPUTS.items()
        ]
        outputs = [
            {"name": "rewards", "datatype": "FP32", "shape": [-1, NUM_ATTRIBUTES]},
            {"name": "exceeded", "datatype": "INT32", "shape": [-1, 1]},
        ]
        return {
            "name": MODEL,
            "versions": ["1"],
            "platform": "python",
            "inputs": inputs,
            "outputs": outputs,
        }

    async def get_config() -> dict[str, Any]:
        """Triton's own description, which a PyTriton client reads before it infers."""
        return triton_config()

    async def post_infer(request: Request) -> Response:
        """Score a batch."""
        header = request.headers.get(LENGTH_HEADER)
        if header is not None and not (header.isascii() and header.isdigit() and len(header) < 16):
            raise RequestError(f"{LENGTH_HEADER} is {header!r:.60}; expected a number")
        asked, inputs = read_request(await request.body(), None if header is None else int(header))
        rows = await asyncio.to_thread(rows_of, inputs, service.engine)
        work = score_rows(service, scorer, rows, context_of(request.scope))
        rewards = await until_disconnect(request.receive, work)
        values = [value for reward in rewards for value in reward.raw]
        outputs = {
            "rewards": Tensor("FP32", (len(rows), NUM_ATTRIBUTES), values),
            "exceeded": Tensor("INT32", (len(rows), 1), [0] * len(rows)),
        }
        body, headers = write_response(asked, MODEL, outputs)
        return Response(body, headers=headers)

    for path in ("/v2/health/live", "/v2/health/ready", *(f"{path}/ready" for path in PATHS)):
        router.add_api_route(path, get_ready, methods=["GET"])
    for path in PATHS:
        router.add_api_route(path, get_metadata, methods=["GET"])
        router.add_api_route(f"{path}/config", get_config, methods=["GET"])
        router.add_api_route(f"{path}/infer", post_infer, methods=["POST"])
    router.add_api_route(
        "/v2/models/{rest:path}", _no_model, methods=["GET", "POST"], include_in_schema=False
    )
    return router


async def _no_model(rest: str) -> Response:
    text = f"There is no /v2/models/{rest[:100]} here; this server has {MODEL!r}, version 1."
    raise ApiError(404, text, code="model_not_found")


def triton_config() -> dict[str, Any]:
    """``config.pbtxt`` as JSON."""
    inputs = [
        {
            "name": name,
            "data_type": TRITON_TYPES[kind],
            "dims": [WIDTHS[name]],
            "optional": True,
        }
        for name, kind in INPUTS.items()
    ]
    return {
        "name": MODEL,
        "backend": "python",
        "max_batch_size": MAX_BATCH,
        "input": inputs,
        "output": [
            {"name": "rewards", "data_type": "TYPE_FP32", "dims": [NUM_ATTRIBUTES]},
            {"name": "exceeded", "data_type": "TYPE_INT32", "dims": [1]},
        ],
        "instance_group": [{"kind": "KIND_CPU", "count": 1}],
        "model_transaction_policy": {"decoupled": False},
        "parameters": {},
    }


def rows_of(inputs: Mapping[str, Tensor], engine: InferenceEngine) -> list[list[int]]:
    """Token ids of every row of the batch."""
    for name, tensor in inputs.items():
        if INPUTS.get(name) != tensor.datatype:
            raise RequestError(
                f"input {name!r} of type {tensor.datatype} is unknown",
                hint=f"known: {', '.join(f'{known} ({kind})' for known, kind in INPUTS.items())}",
            )
    if ("sentences" in inputs) == ("tokens" in inputs):
        raise RequestError("give either the input sentences or the inputs tokens and sequence_lengths")
    if "sentences" in inputs:
        try:
            texts = [value.decode() for value in inputs["sentences"].values]
        except UnicodeDecodeError as error:
            raise RequestError(f"input 'sentences' is not UTF-8 text: {error}") from error
        rows = [encode_text(engine, text) for text in texts]
    else:
        rows = _token_rows(inputs, engine.info.vocab_size)
    if len(rows) > MAX_BATCH:
        raise RequestError(f"the batch has {len(rows)} rows; expected at most {MAX_BATCH}")
    if "add_EOS" in inputs and inputs["add_EOS"].values[0]:
        eos_id = engine.tokenizer.eos_id
        if eos_id is None:
            raise RequestError("add_EOS is true, but the tokenizer has no end-of-text token")
        rows = [[*row, eos_id] for row in rows]
    return rows


def _token_rows(inputs: Mapping[str, Tensor], vocab_size: int) -> list[list[int]]:
    tokens, lengths = inputs["tokens"], inputs.get("sequence_lengths")
    if len(tokens.shape) != 2 or lengths is None or len(lengths.values) != tokens.shape[0]:
        raise RequestError(
            "input 'tokens' needs shape [rows, length] and one value of 'sequence_lengths' a row"
        )
    width = tokens.shape[1]
    if not all(1 <= n <= width for n in lengths.values):
        raise RequestError(f"sequence_lengths are {list(lengths.values)}; expected 1 to {width}")
    if not all(0 <= token < vocab_size for token in tokens.values):
        raise RequestError(f"a token id is outside 0 to {vocab_size - 1}")
    return [list(tokens.values[i * width : i * width + n]) for i, n in enumerate(lengths.values)]
