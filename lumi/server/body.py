"""The JSON of a request. Every fault of it is an error in the API's form that names its cause."""

import json
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from lumi.config import unique_keys


class JsonRoute(APIRoute):
    """A route whose body is read by `read_json`. FastAPI's own reader takes names that stand twice."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """As FastAPI's."""
        handle = super().get_route_handler()

        async def handle_json(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return handle_json


class _JsonRequest(Request):
    async def json(self) -> Any:
        return read_json(await self.body())


def read_json(body: bytes) -> Any:
    """The value of a JSON text. Raises HTTPException, 400, also for a name that stands twice in an object."""
    try:
        return json.loads(body.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        cause = f"must be UTF-8, got byte {body[error.start]:#04x} at {error.start}"
    except json.JSONDecodeError as error:
        cause = f"must be JSON, got an error at character {error.pos}: {error.msg}"
    except RecursionError:
        cause = "must be JSON of a few levels, got hundreds of lists or objects within each other"
    except ValueError as error:  # of `unique_keys`, or an integer that is too long for Python
        cause = f"must be JSON that can be read: {str(error).partition('; use sys.')[0]}"
    raise HTTPException(400, f"the body {cause}")
