"""The web page at ``GET /``: its files, and the few things it asks for that no other route tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response

from nemotron4.engine import RewardScorer
from nemotron4.records import Message
from nemotron4.server.errors import NOT_FOUND, ApiError, html_error
from nemotron4.server.openai_schemas import ChatMessage
from nemotron4.server.relay import Upstream
from nemotron4.server.service import Service
from nemotron4.server.settings import PageSettings
from nemotron4.text import prompt
from nemotron4.text.formats import CARD_STOP_STRINGS
from nemotron4.web import read_files

FOLDER = Path(__file__).parent / "web"
CHAT_SAMPLING = {"temperature": 0.7, "top_p": 0.95}  # what a new conversation starts with


@dataclass(frozen=True)
class PageTab:
    """One more tab of the page: a JavaScript module that draws it, and the routes that answer its requests.

    ``script`` is called NAME.js and exports ``mount(root, context)``, whose result has a method ``shown``.
    The routes lie behind the same front door: the same limits, Host and Origin checks and API keys hold.
    """

    name: str
    title: str
    script: Path
    router: APIRouter


class Tab(BaseModel):
    name: str
    title: str


class OtherModel(BaseModel):
    """The model of ``--compare-with``; ``error`` says why it does not answer."""

    name: str | None
    error: str | None


class Card(BaseModel):
    """What the model card's client sends around a question."""

    prompt: str
    question: str
    end_strings: list[str]


class PageInfo(BaseModel):
    model: str
    sampling: dict[str, float]
    context_length: int
    has_chat: bool
    has_reward: bool
    is_reward_model: bool
    other: OtherModel | None
    starts_with: str
    card: Card
    tabs: list[Tab]


class PromptRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    messages: list[ChatMessage]


def page_routes(service: Service, page: PageSettings, tabs: Sequence[PageTab] = ()) -> APIRouter:
    """``GET /``, ``GET /web/FILE`` and the page's own ``/page/...``."""
    router = APIRouter(include_in_schema=False)
    settings = service.settings
    other = None if settings.compare_with is None else Upstream(settings.compare_with)
    files = read_files(FOLDER, extra=[tab.script for tab in tabs])
    engine = service.engine

    @router.api_route("/", methods=["GET", "HEAD"])
    async def get_page() -> Response:
        return files["index.html"]

    @router.api_route("/web/{name:path}", methods=["GET", "HEAD"])
    async def get_file(name: str) -> Response:
        return files.get(name) or html_error(404, "Not Found", NOT_FOUND)

    @router.get("/page/info")
    async def get_info() -> PageInfo:
        is_reward_model = isinstance(engine, RewardScorer)
        return PageInfo(
            model=engine.info.name,
            sampling=CHAT_SAMPLING,
            context_length=engine.info.context_length,
            has_chat=engine.prompt_format is not None and not is_reward_model,
            has_reward=settings.reward_model is not None,
            is_reward_model=is_reward_model,
            other=None if other is None else await _describe(other),
            starts_with=page.starts_with,
            card=Card(
                prompt=prompt.card_prompt(),
                question=prompt.CARD_QUESTION,
                end_strings=list(CARD_STOP_STRINGS),
            ),
            tabs=[Tab(name=tab.name, title=tab.title) for tab in tabs],
        )

    @router.post("/page/prompt")
    async def post_prompt(body: PromptRequest) -> dict[str, str]:
        """The conversation in the model card's template, as one text."""
        messages = [Message(each.role, _text(each)) for each in body.messages]
        return {"prompt": prompt.render(messages)}

    if other is not None:

        @router.post("/page/compare")
        async def post_compare(request: Request) -> Response:
            return await other.relay(request, "/v1/chat/completions")

    return router


async def _describe(other: Upstream) -> OtherModel:
    try:
        models: Any = await other.get_json("/v1/models")
        return OtherModel(name=str(models["data"][0]["id"]), error=None)
    except ApiError as error:
        return OtherModel(name=None, error=error.message)
    except (KeyError, IndexError, TypeError):
        return OtherModel(name=None, error=f"{other.url}/v1/models names no model")


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, list):
        return "".join(part.text for part in message.content)
    return message.content or ""
