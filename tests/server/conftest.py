"""A browser, and the chat page in it on a stub of the server."""

import pytest
from chat_page import chromium, open_page
from chat_stub import ChatStub


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
