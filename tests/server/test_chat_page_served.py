"""The chat page in a browser, on the server itself."""

import time

from chat_page import ask, check_conversation, open_page, wait_until_answered
from served import make_service, served, wait_until

from lumi.server.limits import Limits


def slow(service, seconds):
    """Give a reader time to stop an answer: the small model would end it before."""
    step = service.scheduler.step
    service.scheduler.step = lambda: time.sleep(seconds) or step()


def test_a_conversation_with_the_server(context, model, tokenizer):
    with served(make_service(model, tokenizer, Limits(max_tokens=100))) as server:
        wait_until(server.is_ready)
        slow(server.service, 0.02)
        page = open_page(context, server.url)
        check_conversation(page)
        wait_until(server.is_idle)  # what was stopped has given its pages back


def test_the_page_asks_for_the_key(context, model, tokenizer):
    with served(make_service(model, tokenizer, Limits(max_tokens=8)), api_key="se-same") as server:
        wait_until(server.is_ready)
        page = context.new_page()
        page.goto(server.url)
        page.fill("dialog[open] input", "se-same")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model:not(:has(option[value='']))")
        ask(page, "What is a list?")
        assert wait_until_answered(page).strip()
