"""Adapters of a running server, loaded and unloaded as vLLM's are."""

from __future__ import annotations

import asyncio
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import PlainTextResponse

from nemotron4.engine import AdapterHost
from nemotron4.errors import CheckpointError, ConfigError, RequestError
from nemotron4.server.context import ApiError
from nemotron4.server.openai_schemas import ERRORS
from nemotron4.server.settings import Service


class LoadAdapter(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    lora_name: str = Field(min_length=1, max_length=200, description="What requests call it as their model.")
    lora_path: str = Field(description="A folder or NeMo's .nemo file on the server's disk.")
    load_inplace: Literal[False] | None = Field(None, description="vLLM's. Not supported: unload it first.")


class UnloadAdapter(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    lora_name: str
    lora_int_id: int | None = Field(None, description="vLLM's. Accepted and ignored.")


def adapter_routes(service: Service) -> APIRouter:
    router = APIRouter()

    def host() -> AdapterHost:
        """ApiError without a key: who may name files of the server's disk has to be known."""
        if not service.settings.api_keys:
            raise ApiError(
                403, "Adapters are changed with an API key only; start the server with --api-key-file FILE."
            )
        if not isinstance(service.engine, AdapterHost):
            raise ApiError(400, f"{service.engine.info.name} takes no adapters while it runs.")
        return service.engine

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse, responses=ERRORS)
    async def load_lora_adapter(body: LoadAdapter) -> str:
        """Put a LoRA adapter next to the model; requests that name it as their model run with it."""
        engine = host()
        if body.lora_name in service.model_names:
            raise ApiError(400, f"The name {body.lora_name!r} is taken.", param="lora_name")
        try:
            await asyncio.to_thread(engine.load_adapter, body.lora_name, body.lora_path)
        except (CheckpointError, ConfigError, RequestError, OSError) as error:
            raise ApiError(400, str(error).replace("\nhint: ", "; "), param="lora_path") from error
        return f"Success: LoRA adapter '{body.lora_name}' added successfully."

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse, responses=ERRORS)
    async def unload_lora_adapter(body: UnloadAdapter) -> str:
        """Forget an adapter; requests that run with it go on."""
        engine = host()
        if body.lora_name not in service.adapter_names:
            raise ApiError(404, f"No adapter {body.lora_name!r} is loaded.", param="lora_name")
        engine.unload_adapter(body.lora_name)
        return f"Success: LoRA adapter '{body.lora_name}' removed successfully."

    return router
