"""/openapi.json tells the truth: schemathesis asks what it describes, and what it does not."""

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from served import NAME, make_service, served, wait_until

from lumi.server.limits import Limits

KEY = "k"
WITH_KEY = {"Authorization": f"Bearer {KEY}"}
OPERATIONS = [
    ("get", "/health"),
    ("get", "/metrics"),
    ("get", "/v1/models"),
    ("get", "/v1/models/{name}"),
    ("post", "/v1/chat/completions"),
    ("post", "/v1/completions"),
]


@pytest.fixture(scope="module")
def described(model, tokenizer):
    """The description that a server with a key gives of itself."""
    limits = Limits(max_tokens=4, max_choices=3)
    with served(make_service(model, tokenizer, limits), api_key=KEY) as server:
        wait_until(server.is_ready)
        yield schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def test_all_is_described(described):
    operations = [result.ok() for result in described.get_all_operations()]
    assert sorted((operation.method, operation.path) for operation in operations) == OPERATIONS


# What a schema cannot say: fields that go together, what the model and its template take, and, since its
# numbers are floats, the difference of one at 2**63.
RULES = (
    "seed: Input should be",
    "must come with stream: true",
    "must come with logprobs: true",
    "are the same; give one of them",
    "must be at least 1 without echo",
    "messages must be at most one of the system first, then of user and assistant in turn",
    "has reasoning_content",
    "must have a place for reasoning_content",
    "n times the prompts must be at most 3",
    "ids must be below 384",
    "a prompt must be shorter than the model's 256 positions",
)


def with_model(case):
    """A strange name is 404, and nothing else of the body matters: ask for the right one."""
    if isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
        case.body["model"] = NAME
    return case


def asking(operation, mode, count):
    """A test that asks an operation `count` times."""
    examples = settings(max_examples=count, deadline=None, database=None, suppress_health_check=HealthCheck)
    cases = operation.as_strategy(generation_mode=mode).map(with_model)
    return lambda test: examples(given(case=cases)(test))


counts = pytest.mark.parametrize("count", [30, pytest.param(1000, marks=pytest.mark.soak)])


@counts
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_valid_requests_are_answered_as_described(method, path, count, described):
    statuses = set()

    @asking(described[path][method], GenerationMode.POSITIVE, count)
    def ask(case):
        # The check that is left out takes every 400 and 422 for a fault. Here the rule must be a known one.
        response = case.call_and_validate(headers=WITH_KEY, excluded_checks=[positive_data_acceptance])
        statuses.add(response.status_code)
        if response.status_code in (400, 422):
            message = response.json()["error"]["message"]
            assert any(rule in message for rule in RULES), message

    ask()
    assert path == "/v1/models/{name}" or 200 in statuses


@counts
@pytest.mark.parametrize(("method", "path"), OPERATIONS[3:])
def test_invalid_requests_are_refused_as_described(method, path, count, described):
    @asking(described[path][method], GenerationMode.NEGATIVE, count)
    def ask(case):
        case.call_and_validate(headers=WITH_KEY)

    ask()
