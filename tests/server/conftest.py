"""One server with a small model for all tests of a file that only ask."""

import pytest
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
