"""What a person does with the chat page, for tests that do it in Chromium.

`check_conversation` needs no stub: `open_page` takes the address of a real server too.
"""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


@contextmanager
def chromium() -> Iterator:
    """Chromium, driven by Playwright. Skips the test where one of both is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed here")
    program = shutil.which("chromium")
    if program is None:
        pytest.skip("there is no chromium on PATH to open the chat page with")
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=flags)
        yield browser
        browser.close()


def open_page(context, address: str):
    """The chat page in a new tab, connected to its server. Errors of its script are in `page.failures`."""
    page = context.new_page()
    page.failures = []
    page.on("pageerror", lambda failure: page.failures.append(str(failure)))
    page.goto(address)
    page.wait_for_selector("#model:not(:has(option[value='']))")
    return page


def wait_until(page, condition: str, seconds: float = 20) -> None:
    """Waits for an expression to be true. Playwright's own way evaluates text, which the page forbids."""
    end = time.monotonic() + seconds
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"never true: {condition}"
        page.wait_for_timeout(20)


def ask(page, text: str) -> None:
    """Types a question and sends it."""
    page.fill("#question", text)
    page.press("#question", "Enter")


def wait_until_answered(page) -> str:
    """Waits for the end of the last answer. Returns its text."""
    page.wait_for_selector("#messages[aria-busy=false] > .assistant:last-child")
    return page.inner_text("#messages > :last-child .content")


def last_failure(page) -> str:
    """The error under the last answer, once it is there."""
    page.wait_for_selector(".message:last-child .failure:visible")
    return page.inner_text(".message:last-child .failure p")


def questions(page) -> list[str]:
    """The user's messages in the open conversation."""
    return page.locator(".user .content").all_inner_texts()


def check_conversation(page) -> None:
    """Asks, stops, regenerates, edits and reloads.

    It does not matter what the server says. The second and third answers must be long enough to be stopped
    after their first words.
    """
    ask(page, "What is a list?")
    assert wait_until_answered(page).strip()
    assert page.locator(".failure:visible").count() == 0
    assert "token" in page.inner_text(".assistant .stats")

    ask(page, "And a tuple?")
    page.wait_for_selector(".message:nth-child(4).running .content:not(:empty)")
    page.click("#stop")
    assert wait_until_answered(page).strip()
    assert page.inner_text("#messages > :last-child .badge") == "Stopped"

    page.click(".again:visible")
    page.wait_for_selector(".message:nth-child(4).running .content:not(:empty)")
    page.keyboard.press("Escape")
    wait_until_answered(page)
    assert questions(page) == ["What is a list?", "And a tuple?"]

    first = page.locator(".user").first
    first.hover()
    first.locator(".edit").click()
    page.fill(".editor textarea", "What is a set?")
    page.click(".editor .main")
    answer = wait_until_answered(page)
    assert questions(page) == ["What is a set?"]
    assert page.locator(".assistant").count() == 1

    page.reload()
    assert questions(page) == ["What is a set?"]
    assert page.inner_text(".assistant .content") == answer
    assert page.failures == []
