"""What went wrong, in the API's form."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lumi.chat.messages import MalformedConversation
from lumi.config import UserError
from lumi.server.schema import Error, ErrorResponse

RETRY_SECONDS = 1
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error that a client gets.

    Args:
        status: of HTTP.
        param: the field of the request.
        code: a word for programs.
        may_retry: False: the same request would fail again.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        may_retry: bool = True,
    ):
        super().__init__(message)
        self.status = status
        kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
        self.error = Error(message=message, type=kind, param=param, code=code)
        self.headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if not may_retry:
            self.headers["x-should-retry"] = "false"  # what OpenAI's clients look at

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return ErrorResponse(error=self.error).model_dump()


def refused(error: UserError | MalformedConversation, param: str | None = None) -> ApiError:
    """What the model or its template does not take."""
    return ApiError(400, str(error), param=param, code="invalid_value")


def handle_errors(app: FastAPI) -> None:
    """Answer every error in the API's form."""

    @app.exception_handler(ApiError)
    async def api_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    async def wrong_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()
        fields = [field for field in map(_field, found) if field]
        said = "; ".join(_describe(each) for each in found[:5])
        wrong = ApiError(422, said, param=fields[0] if fields else None, code="invalid_fields")
        return JSONResponse(wrong.body, 422)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        other = ApiError(error.status_code, str(error.detail))
        return JSONResponse(other.body, other.status, {**other.headers, **(error.headers or {})})

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, f"the server failed: {type(error).__name__}").body, 500)


def _field(error: dict[str, Any]) -> str:
    """The field's dotted name, without the names of the kinds that it could have been."""
    place: Sequence[Any] = error["loc"][1:]
    return ".".join(str(part) for part in place if isinstance(part, int) or str(part).isidentifier())


def _describe(error: dict[str, Any]) -> str:
    field = _field(error)
    return f"{field}: {error['msg']}" if field else error["msg"]
