"""The web page at ``GET /``: its files, what it asks for, and a proxy for what another server answers.

The page may talk to its own server only (its content-security policy, and no server here sends CORS headers),
so this one passes such a request on: to one address, to the paths named in the code, without the caller's
headers and key, and without following redirects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from nemotron4.engine import ModelInfo, RewardScorer
from nemotron4.server.context import NOT_FOUND, ApiError, html_error
from nemotron4.server.openai_schemas import Messages
from nemotron4.server.rows import until_disconnect
from nemotron4.server.settings import PageSettings, RemoteServer, Service
from nemotron4.text import prompt
from nemotron4.text.formats import CARD_STOP_STRINGS
from nemotron4.text.messages import with_calls_as_text
from nemotron4.text.tokenizer import check_encodable
from nemotron4.web import read_files

if TYPE_CHECKING:
    import aiohttp  # at run time where it is used: a server that asks no other one starts without it

CONNECT_TIMEOUT_S = 5.0
SILENCE_TIMEOUT_S = 600.0  # between two pieces of an answer


class Proxy:
    """One other server."""

    def __init__(self, endpoint: RemoteServer) -> None:
        self.url = endpoint.url.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if endpoint.api_key:
            self._headers["Authorization"] = f"Bearer {endpoint.api_key}"

    async def get_json(self, path: str) -> Any:
        """The decoded answer; ApiError 502 with the reason when there is none."""
        import aiohttp

        try:
            async with (
                self._session() as session,
                session.get(self.url + path, allow_redirects=False) as answer,
            ):
                if answer.status != 200:
                    raise ApiError(502, f"{self.url}{path} answered {answer.status}")
                return await answer.json(content_type=None)
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise self._unreachable(error) from error

    async def forward(self, request: Request, path: str) -> Response:
        """The other server's answer to this request's body, piece by piece as it comes."""
        return _Relayed(self, path, await request.body())

    def _session(self) -> aiohttp.ClientSession:
        import aiohttp

        # One for each request: people click less often than a connection costs.
        timeout = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_TIMEOUT_S)
        return aiohttp.ClientSession(headers=self._headers, timeout=timeout)

    def _unreachable(self, error: Exception) -> ApiError:
        reason = str(error) or type(error).__name__
        return ApiError(502, f"{self.url} does not answer: {reason}")


class _Relayed(Response):
    def __init__(self, upstream: Proxy, path: str, body: bytes) -> None:
        super().__init__()
        self._upstream = upstream
        self._path = path
        self._body = body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await until_disconnect(receive, self._pass_on(send))

    async def _pass_on(self, send: Send) -> None:
        import aiohttp

        upstream, has_started = self._upstream, False
        try:
            async with (
                upstream._session() as session,
                session.post(upstream.url + self._path, data=self._body, allow_redirects=False) as answer,
            ):
                kind = answer.headers.get("Content-Type", "application/json")
                headers = [(b"content-type", kind.encode("latin-1")), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": answer.status, "headers": headers})
                has_started = True
                async for piece in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if has_started:  # cut off: the client sees an answer without its end
                raise
            raise upstream._unreachable(error) from error


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
    files: Sequence[Path] = ()  # further files of the tab


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
    checkpoint: str
    has_chat: bool
    has_reward: bool
    is_reward_model: bool
    other: OtherModel | None
    starts_with: str
    card: Card
    tabs: list[Tab]


class PromptRequest(BaseModel):
    model_config = ConfigDict(extra="forbid")

    messages: Messages


def page_routes(service: Service, page: PageSettings, tabs: Sequence[PageTab] = ()) -> APIRouter:
    """``GET /``, ``GET /web/FILE`` and the page's own ``/page/...``."""
    router = APIRouter(include_in_schema=False)
    settings = service.settings
    other = None if settings.compare_with is None else Proxy(settings.compare_with)
    files = read_files(FOLDER, extra=[path for tab in tabs for path in (tab.script, *tab.files)])
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
            checkpoint=_computed(engine.info),
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
        text = prompt.render(with_calls_as_text(body.messages, None))
        check_encodable(text)
        return {"prompt": text}

    if other is not None:

        @router.post("/page/compare")
        async def post_compare(request: Request) -> Response:
            return await other.forward(request, "/v1/chat/completions")

    return router


def _computed(info: ModelInfo) -> str:
    """The checkpoint in a sentence, and how it is computed; "" for an engine without one."""
    return info.checkpoint and f"Checkpoint: {info.checkpoint}; computed in {info.dtype} on {info.device}."


async def _describe(other: Proxy) -> OtherModel:
    try:
        models: Any = await other.get_json("/v1/models")
        return OtherModel(name=str(models["data"][0]["id"]), error=None)
    except ApiError as error:
        return OtherModel(name=None, error=error.message)
    except (KeyError, IndexError, TypeError):
        return OtherModel(name=None, error=f"{other.url}/v1/models names no model")
