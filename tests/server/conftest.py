"""One server with a small model for all tests of a file that only ask; and the chat page in a browser, on a
stub of the server."""

import pytest
from chat_page import chromium, open_page
from chat_stub import ChatStub
from crafted_models import wanderer
from served import make_service, served, wait_until

from lumi.server.limits import Limits

LIMITS = Limits(max_tokens=64)


@pytest.fixture(scope="session")
def model(tokenizer):
    """A model whose texts depend on all of their tokens, and do not end."""
    return wanderer(tokenizer)


@pytest.fixture(scope="module")
def server(model, tokenizer):
    """A server of `model`."""
    with served(make_service(model, tokenizer, LIMITS)) as server:
        wait_until(server.is_ready)
        yield server


@pytest.fixture(scope="module")
def client(server):
    """OpenAI's client of `server`."""
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def browser():
    """Chromium. Not for longer: Playwright keeps an event loop, beside which asyncio.run() fails."""
    with chromium() as browser:
        yield browser


@pytest.fixture
def stub():
    with ChatStub() as stub:
        yield stub


@pytest.fixture
def context(browser):
    """A profile of its own, as wide as a desktop."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    context.set_default_timeout(20_000)
    yield context
    context.close()


@pytest.fixture
def page(context, stub):
    """The chat page, connected to `stub`. Its script must not fail."""
    page = open_page(context, stub.address)
    yield page
    assert page.failures == []
