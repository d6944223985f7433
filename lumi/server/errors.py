"""What went wrong, in the API's form."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lumi.chat.messages import MalformedConversation
from lumi.config import UserError
from lumi.server.schema import Error, ErrorResponse

RETRY_SECONDS = 1
_MOST_ERRORS = 20  # that are looked at
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
        found = error.errors()[:_MOST_ERRORS]
        fields = [_field(each, error.body) for each in found]
        said = dict.fromkeys(map(_describe, found, fields))  # once each, in order
        param = next(filter(None, fields), None)
        wrong = ApiError(422, "; ".join([*said][:5]), param=param, code="invalid_fields")
        return JSONResponse(wrong.body, 422)

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        other = ApiError(error.status_code, str(error.detail))
        return JSONResponse(other.body, other.status, {**other.headers, **(error.headers or {})})

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        return JSONResponse(ApiError(500, f"the server failed: {type(error).__name__}").body, 500)


def _field(error: dict[str, Any], body: Any) -> str:
    """The dotted name of a field, as far as the body has it, and of one that is missing.

    Pydantic's place also holds the kinds that a value could have been, such as "str".
    """
    names, value = [], body
    for part in error["loc"][1:]:
        try:
            value = value[part]
        except (KeyError, IndexError, TypeError):
            if error["type"] != "missing" or part != error["loc"][-1]:
                continue
        names.append(str(part))
    return ".".join(names)


def _describe(error: dict[str, Any], field: str) -> str:
    if error["loc"] == ("body",) and error["type"] in ("missing", "model_attributes_type"):
        return "the body must be a JSON object, sent as application/json"
    if error["type"] == "json_invalid":
        return f"the body must be JSON, got an error at character {error['loc'][1]}: {error['ctx']['error']}"
    said = error["msg"].removeprefix("Value error, ")
    return f"{field}: {said}" if field else said
