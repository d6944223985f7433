"""The routes of the server."""

import asyncio
import base64
import contextlib
import hashlib
import hmac
import re
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumi import __version__
from lumi.server import schema
from lumi.server.body import JsonRoute
from lumi.server.errors import ApiError, handle_errors, shortened
from lumi.server.service import Service
from lumi.server.wire import ChatWire, TextWire, Wire

PAGE = Path(__file__).with_name("chat.html")
_CLIENT_GONE = 499  # nginx's; nobody reads it
_DATA = {"type": "string", "description": "a chunk or an error as JSON, or [DONE]"}
_EVENT = {"type": "object", "required": ["data"], "properties": {"data": _DATA}}
_STREAM = {"text/event-stream": {"itemSchema": _EVENT}}

Result = TypeVar("Result")


def create_app(service: Service, *, api_key: str | None = None, hosts: Sequence[str] = ()) -> FastAPI:
    """The server as an ASGI application.

    Args:
        api_key: what clients must send as a bearer token; None: nothing.
        hosts: names by which the server may be asked for; none: any. On a machine without a key they keep
            other pages in the browser from reaching it under a name of their own (DNS rebinding).
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        service.stop()

    app = FastAPI(title="Lumi", version=__version__, lifespan=lifespan, redoc_url=None)
    app.add_middleware(_BodyLimit, max_bytes=service.limits.max_body_bytes)
    if hosts:
        app.add_middleware(_HostCheck, hosts=hosts)
    app.router.route_class = JsonRoute
    handle_errors(app)
    _add_page(app)
    _add_state(app, service, [Depends(_key_check(api_key))])
    _add_completions(app, service, [Depends(_key_check(api_key))])
    return app


class _HostCheck:
    """Refuses requests for other names. Starlette's own has no error in the API's form."""

    def __init__(self, app: ASGIApp, hosts: Sequence[str]):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer: ASGIApp = self.app
        if scope["type"] != "lifespan":
            host = Headers(scope=scope).get("host", "")
            if re.sub(r":\d*$", "", host).lower() not in self.hosts:
                message = (
                    f"this server must be asked for by one of its names, {', '.join(self.hosts)}, "
                    f"got the Host header {shortened(host)!r}; for others start it with --host and a key"
                )
                answer = JSONResponse(ApiError(400, message, code="invalid_host").body, 400)
        await answer(scope, receive, send)


class _BodyLimit:
    """Ends a request whose body is too long. Starlette's own has no error in the API's form."""

    def __init__(self, app: ASGIApp, max_bytes: int):
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        size = 0

        async def limited() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_bytes:
                raise HTTPException(413, f"a request must have at most {self.max_bytes:,} bytes here")
            return message

        await self.app(scope, limited, send)


def _key_check(api_key: str | None) -> Any:
    bearer = HTTPBearer(auto_error=False, description="the key that the server was started with, if any")

    async def check(given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]) -> None:
        if api_key is None:
            return
        key = "" if given is None else given.credentials
        if not hmac.compare_digest(key.encode(), api_key.encode()):  # takes the same time for any wrong key
            wrong = "a wrong API key" if key else "no API key"
            message = f"this server needs its API key as a bearer token, got {wrong}"
            raise ApiError(401, message, code="invalid_api_key")

    return check


def _add_page(app: FastAPI) -> None:
    html = PAGE.read_text(encoding="utf-8")
    parts = {tag: re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL) for tag in ("style", "script")}
    hashes = {tag: " ".join(map(_source_hash, found)) for tag, found in parts.items()}
    policy = (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
    headers |= {"Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers=headers)


def _source_hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": schema.ErrorResponse} for status in statuses}


def _add_state(app: FastAPI, service: Service, key: list[Any]) -> None:
    @app.get("/health", responses={503: {"model": schema.Health}})
    async def health() -> schema.Health:
        """Whether the model is loaded."""
        try:
            _ = service.scheduler
        except ApiError as error:
            loading = schema.Health(status="loading").model_dump()
            return JSONResponse(loading, 503, error.headers)  # type: ignore[return-value]
        return schema.Health(status="ok")

    @app.get("/metrics", dependencies=key, response_class=Response, responses=_errors(401, 503))
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(service.scheduler), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=key, responses=_errors(401, 503))
    async def models() -> schema.ModelList:
        """The model that is served."""
        return schema.ModelList(data=[_model(service)])

    @app.get("/v1/models/{name:path}", dependencies=key, responses=_errors(401, 404, 503))
    async def model(name: str) -> schema.Model:
        """The model, if it has this name."""
        service.check_model(name)
        return _model(service)


def _model(service: Service) -> schema.Model:
    length = service.scheduler.max_tokens
    return schema.Model(id=service.model_name, created=service.created, max_model_len=length)


def _add_completions(app: FastAPI, service: Service, key: list[Any]) -> None:
    limits = service.limits
    most = {"max_tokens": limits.max_tokens, "max_choices": limits.max_choices}
    chat_type: Any = schema.limited(schema.ChatRequest, **most)
    text_type: Any = schema.limited(schema.CompletionRequest, **most)
    described = _errors(400, 401, 404, 413, 422, 429, 500, 503, 504)
    chat_responses: dict[int | str, dict[str, Any]] = {200: {"content": _STREAM}, **described}

    @app.post(
        "/v1/chat/completions",
        dependencies=key,
        response_model=schema.ChatCompletion,
        responses=chat_responses,
    )
    async def chat(body: chat_type, request: Request) -> Response:
        """The next answer of a conversation."""
        choices = await service.chat(body)
        wire = ChatWire(service.tokenizer, service.model_name, choices, service.run(choices))
        return await _respond(wire, body, request)

    @app.post(
        "/v1/completions",
        dependencies=key,
        response_model=schema.Completion,
        responses=chat_responses,
    )
    async def complete(body: text_type, request: Request) -> Response:
        """Continuations of texts."""
        choices = await service.complete(body)
        tokenizer, echoes = service.tokenizer, list[str]()
        if body.echo:
            texts = [
                prompt if isinstance(prompt, str) else tokenizer.decode(prompt) for prompt in body.prompts
            ]
            echoes = [text for text in texts for _ in range(body.n)]
        wire = TextWire(tokenizer, service.model_name, choices, service.run(choices), echoes)
        return await _respond(wire, body, request)


async def _respond(wire: Wire, body: schema.Generation, request: Request) -> Response:
    try:
        if not body.stream:
            whole = await _unless_gone(request, wire.collect())
            return Response(whole.model_dump_json(), media_type="application/json")
        # The status of a response comes first: a stream begins when there is something to send.
        first = await _unless_gone(request, _first(wire))
    except _ClientGone:
        return Response(status_code=_CLIENT_GONE)
    return _Events(wire, first, body.wants_usage)


class _Events(StreamingResponse):
    """A stream. What it left undone is cancelled as soon as it ends."""

    def __init__(self, wire: Wire, first: Any, wants_usage: bool):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(wire.stream(first, wants_usage), media_type="text/event-stream", headers=headers)
        self.wire = wire

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self.wire.news.aclose()


async def _first(wire: Wire) -> Any:
    return await anext(wire.news)


class _ClientGone(Exception):  # noqa: N818 - nothing failed
    pass


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Wait for work, and cancel it when the client goes away."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise _ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
