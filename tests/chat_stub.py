"""A server that stands in for `lumi serve` behind the chat page: it answers what a test tells it to.

`python tests/chat_stub.py` serves the page to look at, until Ctrl+C.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

PAGE = Path(__file__).parent.parent / "lumi" / "server" / "chat.html"

ANSWER = """\
`textwrap.dedent` removes the white space that **all lines of a text share** at their start.

```python
from textwrap import dedent

text = dedent(\"\"\"\\
    Lumi
      trains models
\"\"\")
```

| call | what it does |
| --- | --- |
| `dedent` | removes shared indentation |
| `indent` | adds a prefix to lines |

Tabs and spaces are *not* equal.
"""


@dataclass
class Reply:
    """What a request gets: a status and a body, whole or in pieces."""

    pieces: Iterable[bytes]
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})


def event(value: object) -> bytes:
    """A server-sent event."""
    return f"data: {value if isinstance(value, str) else json.dumps(value)}\n\n".encode()


def chunk(text: str | None = None, finish: str | None = None, **delta: str) -> bytes:
    """One piece of an answer."""
    delta = delta if text is None else {"content": text, **delta}
    return event({"choices": [{"index": 0, "delta": delta, "finish_reason": finish}], "usage": None})


def answer(text: str, finish: str = "stop", seconds: float = 0.0, prompt_tokens: int = 12) -> Iterator[bytes]:
    """The events of an answer, a word each and `seconds` apart."""
    words = re.findall(r"\s*\S+\s*?|\s+$", text)
    yield chunk("", role="assistant")
    for word in words:
        time.sleep(seconds)
        yield chunk(word)
    yield chunk(finish=finish)
    total = prompt_tokens + len(words)
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": len(words), "total_tokens": total}
    yield event({"choices": [], "usage": usage})
    yield event("[DONE]")


def endless() -> Iterator[bytes]:
    """Words until the browser hangs up."""
    while True:
        yield chunk("more ")
        time.sleep(0.02)


def error(
    status: int, message: str, code: str | None = None, kind: str = "invalid_request_error", **headers: str
) -> Reply:
    """An error as the OpenAI API has it."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": code}}
    return Reply([json.dumps(body).encode()], status, {"Content-Type": "application/json", **headers})


def policy(page: str) -> str:
    """The strictest Content-Security-Policy that the page must work under: its own style and script alone."""

    def allowed(name: str) -> str:
        (text,) = re.findall(rf"<{name}>(.*?)</{name}>", page, re.DOTALL)
        return "'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() + "'"

    return (
        f"default-src 'none'; style-src {allowed('style')}; script-src {allowed('script')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class ChatStub:
    """A server on a free port of this machine, for a `with` block.

    Attributes:
        address: its URL, without a slash at the end.
        models: what `/v1/models` gets.
        replies: what the next requests for an answer get, the first first. Without one: `ANSWER`.
        requests: (headers, body) of the requests for an answer.
        key: the API key that requests must bring, or None.
        hung_up: set when the browser ended a connection before its end.
    """

    def __init__(self, seconds: float = 0.0):
        self.models: Reply | None = None
        self.replies: list[Reply] = []
        self.requests: list[tuple[dict[str, str], dict]] = []
        self.key: str | None = None
        self.hung_up = threading.Event()
        self.seconds = seconds
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "ChatStub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path == "/":
                    page = PAGE.read_text(encoding="utf-8")
                    headers = {"Content-Type": "text/html; charset=utf-8"}
                    self._send(
                        Reply([page.encode()], headers=headers | {"Content-Security-Policy": policy(page)})
                    )
                elif self._is_refused():
                    pass
                elif self.path == "/v1/models":
                    models = [{"id": "lumi-small", "object": "model", "max_model_len": 2048}]
                    body = json.dumps({"object": "list", "data": models}).encode()
                    self._send(stub.models or Reply([body], headers={"Content-Type": "application/json"}))
                else:
                    self._send(error(404, f"no {self.path}"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if self._is_refused():
                    return
                stub.requests.append((dict(self.headers), body))
                self._send(
                    stub.replies.pop(0) if stub.replies else Reply(answer(ANSWER, seconds=stub.seconds))
                )

            def _is_refused(self) -> bool:
                if stub.key is None or self.headers["Authorization"] == f"Bearer {stub.key}":
                    return False
                self._send(error(401, "a key is needed", code="invalid_api_key"))
                return True

            def _send(self, reply: Reply) -> None:
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.end_headers()
                try:
                    for piece in reply.pieces:
                        self.wfile.write(piece)
                        self.wfile.flush()
                except OSError:
                    stub.hung_up.set()

            def log_message(self, *_: object) -> None:
                pass

        return Handler


if __name__ == "__main__":
    with ChatStub(seconds=0.05) as stub:
        print(stub.address)
        threading.Event().wait()
