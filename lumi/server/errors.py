"""What went wrong, in the API's form."""

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lumi.chat.messages import MalformedConversation
from lumi.config import UserError
from lumi.server.schema import NEUTRAL_FIELDS, Error, ErrorResponse

RETRY_SECONDS = 1
_MOST_ERRORS = 20  # that are looked at
_MOST_CHARACTERS = 2000  # of a message: it may hold what the client sent
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
        text = shortened(message, _MOST_CHARACTERS)
        self.error = Error(message=text, type=kind, param=param, code=code)
        self.headers = {"Retry-After": str(RETRY_SECONDS)} if status in (429, 503) else {}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"
        if not may_retry:
            self.headers["x-should-retry"] = "false"  # what OpenAI's clients look at

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        return ErrorResponse(error=self.error).model_dump()


def shortened(text: str, most: int = 100) -> str:
    """The beginning of a text of a client's."""
    return text if len(text) <= most else f"{text[:most]}..."


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
        places = [(_field(each, error.body), each) for each in found]
        apt = [place for place in places if not _is_of_another_kind(*place, places)]
        said = dict.fromkeys(_describe(each, field) for field, each in apt)  # once each, in order
        param = next((field for field, _ in apt if field), None)
        wrong = ApiError(422, "; ".join([*said][:5]), param=param, code="invalid_fields")
        return JSONResponse(wrong.body, 422)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> JSONResponse:
        said = f"there is nothing at {shortened(request.url.path)}; /openapi.json lists what there is"
        other = ApiError(error.status_code, said if error.status_code == 404 else str(error.detail))
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
        names.append(shortened(str(part)))
    return ".".join(names)


def _is_of_another_kind(field: str, error: dict[str, Any], places: list[tuple[str, dict[str, Any]]]) -> bool:
    """Whether a value has the type of another kind that its field takes: an error says so, or one within."""
    return _is_of_type(error) and any(
        other.startswith(f"{field}.") or (other == field and not _is_of_type(its)) for other, its in places
    )


def _is_of_type(error: dict[str, Any]) -> bool:
    return error["type"].endswith("_type")


def _describe(error: dict[str, Any], field: str) -> str:
    if error["loc"] == ("body",) and error["type"] in ("missing", "model_attributes_type"):
        return "the body must be a JSON object, sent as application/json"
    said = error["msg"].removeprefix("Value error, ")
    if (root := field.partition(".")[0]) in NEUTRAL_FIELDS:
        return f"{root}: is not supported here; leave it out"
    if error["type"] == "extra_forbidden":
        said = "is no field of this API"
    return f"{field}: {said}" if field else said
