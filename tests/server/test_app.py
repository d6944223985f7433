"""Routes, the page, and what reaches them."""

import hmac
import re

import httpx2
import pytest
from fastapi.testclient import TestClient
from served import NAME, make_service, served, wait_until
from starlette.routing import Route

import lumi.server.app
from lumi.server.app import PAGE, create_app
from lumi.server.body import JsonRoute

TRAVERSALS = [
    "/../../etc/passwd",
    "/..%2f..%2fetc/passwd",
    "/%2e%2e/%2e%2e/etc/passwd",
    "/v1/../../../etc/passwd",
    "/v1/models/../../../../etc/passwd",
    "/v1/models/..%2f..%2f..%2fetc%2fpasswd",
    "/v1/models/%2Fetc%2Fpasswd",
    "/chat.html",
    "/lumi/server/app.py",
    "/static/chat.html",
    "//etc/passwd",
    "/docs/../../etc/passwd",
]


def test_no_route_leads_to_files(model, tokenizer):
    """All routes are functions of the server, and none is a folder."""
    app = create_app(make_service(model, tokenizer))
    assert {type(route) for route in app.routes} <= {Route, JsonRoute}
    assert {route.path for route in app.routes} == {
        "/",
        "/docs",
        "/docs/oauth2-redirect",
        "/health",
        "/metrics",
        "/openapi.json",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/v1/models/{name:path}",
    }


@pytest.mark.parametrize("path", TRAVERSALS)
def test_a_path_out_of_the_routes_is_404(path, server):
    connection = httpx2.Client()
    request = connection.build_request("GET", server.url)
    request.url = request.url.copy_with(raw_path=path.encode())  # as it stands, not made canonical
    answer = connection.send(request)
    assert answer.status_code == 404
    assert answer.json()["error"]["type"] == "not_found_error"


def test_models(client):
    [listed] = client.models.list()
    assert listed == client.models.retrieve(NAME)
    assert (listed.id, listed.object, listed.owned_by, listed.max_model_len) == (NAME, "model", "lumi", 256)


def test_a_name_may_have_slashes(model, tokenizer):
    with served(make_service(model, tokenizer, name="org/tiny v1")) as server, server.client() as client:
        wait_until(server.is_ready)
        assert client.models.retrieve("org/tiny v1").id == "org/tiny v1"
        assert client.completions.create(model="org/tiny v1", prompt="a").model == "org/tiny v1"


def test_the_page_may_run_its_own_script_and_ask_its_own_server(server):
    answer = httpx2.get(server.url)
    assert answer.text == PAGE.read_text(encoding="utf-8")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"('sha256-[\w+/]{43}=' ?)+", policy[kind])
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.fixture(scope="module")
def local(model, tokenizer):
    """A server that is asked for as localhost alone."""
    with served(make_service(model, tokenizer), hosts=("localhost", "[::1]")) as server:
        yield server


class TestHosts:
    @pytest.mark.parametrize("host", ["localhost", "localhost:8000", "LOCALHOST", "[::1]:8000"])
    def test_its_own_names(self, host, local):
        assert httpx2.get(f"{local.url}/health", headers={"Host": host}).status_code in (200, 503)

    @pytest.mark.parametrize(
        "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example:80", ""]
    )
    @pytest.mark.parametrize("path", ["/", "/health", "/v1/models", "/none"])
    def test_a_name_of_somebody_else_s(self, path, host, local):
        """Rebinding: a page makes its name lead here, and the browser takes the server for that page's."""
        answer = httpx2.get(local.url + path, headers={"Host": host})
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (400, "invalid_host", None)
        assert error["message"] == (
            "this server must be asked for by one of its names, localhost, [::1], "
            f"got the Host header {host!r}; for others start it with --host and a key"
        )

    def test_a_long_name_does_not_come_back_whole(self, local):
        answer = httpx2.get(local.url, headers={"Host": "x" * 5000})
        assert answer.status_code == 400
        assert len(answer.text) < 500


def test_the_key_is_compared_in_constant_time(model, tokenizer, monkeypatch):
    compared = []

    def spy(given, right):
        compared.append((given, right))
        return compare(given, right)

    compare = hmac.compare_digest
    monkeypatch.setattr(lumi.server.app.hmac, "compare_digest", spy)
    with TestClient(create_app(make_service(model, tokenizer), api_key="right")) as client:
        for key in ("wrong", "righ", "right"):
            client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
        client.get("/v1/models")
    assert compared == [(key, b"right") for key in (b"wrong", b"righ", b"right", b"")]


def test_the_key_is_in_no_answer(model, tokenizer):
    key = "k3y-that-nobody-may-see"
    with served(make_service(model, tokenizer), api_key=key) as server:
        wait_until(server.is_ready)
        for headers in ({}, {"Authorization": f"Bearer {key}"}):
            for path in (
                "/",
                "/docs",
                "/openapi.json",
                "/health",
                "/metrics",
                "/v1/models",
                "/v1/models/x",
                "/x",
            ):
                answer = httpx2.get(server.url + path, headers=headers)
                assert key not in answer.text + str(answer.headers)
            answer = httpx2.post(f"{server.url}/v1/completions", json={"model": 1}, headers=headers)
            assert key not in answer.text
