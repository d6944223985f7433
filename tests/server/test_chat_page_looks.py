"""The chat page for all: by keyboard, with a screen reader, on a phone, in light and dark."""

import json

import pytest
from chat_page import ask, last_failure, open_page, questions, wait_until_answered
from chat_stub import Reply, answer, chunk, endless, error

PHONE = {"width": 375, "height": 700}
DESKTOP = {"width": 1200, "height": 800}


def focused(page):
    """The id of what has the focus, or its class."""
    return page.evaluate("document.activeElement.id || document.activeElement.className")


def go_to_start(page):
    """Moves the focus to the first thing that can have it."""
    for _ in range(3):
        page.keyboard.press("Tab")
        if focused(page) == "skip":
            return
    pytest.fail("Tab does not lead from the question to the skip link")


ORDER = [
    "skip",
    "new",
    "a",
    "icon rename",
    "icon delete",
    "theme",
    "settings-button",
    "icon copy",
    "icon edit",
]
ORDER += ["copy-code", "pre", "icon copy", "icon again", "question"]

SHOWS_FOCUS = """(() => {
    const shows = (node) => {
        const { outlineStyle, outlineWidth, boxShadow } = getComputedStyle(node);
        return outlineStyle !== "none" && parseFloat(outlineWidth) >= 2 || boxShadow !== "none";
    };
    const { activeElement } = document;
    return shows(activeElement.id === "question" ? activeElement.parentElement : activeElement);
})()"""


class TestKeyboard:
    def test_everything_is_reached_in_order_and_shows_the_focus(self, page, stub):
        stub.replies = [Reply(answer("```\ncode\n```"))]
        ask(page, "code")
        wait_until_answered(page)
        go_to_start(page)
        seen = [focused(page)]
        while seen[-1] != "question":
            page.keyboard.press("Tab")
            seen.append(focused(page) or page.evaluate("document.activeElement.localName"))
            assert page.evaluate(SHOWS_FOCUS), seen
        assert seen == ORDER

    def test_a_conversation_by_keys_alone(self, page, stub):
        stub.replies = [Reply(endless()), Reply(answer("Done."))]
        page.keyboard.type("one")
        page.keyboard.press("Shift+Enter")
        page.keyboard.type("two")
        page.keyboard.press("Enter")
        page.wait_for_selector("text=more more")
        page.keyboard.press("Enter")  # nothing to send
        page.keyboard.press("Escape")
        wait_until_answered(page)
        assert questions(page) == ["one\ntwo"]
        assert focused(page) == "question"
        page.keyboard.press("Shift+Tab")
        assert focused(page) == "icon again"
        page.keyboard.press("Enter")
        assert wait_until_answered(page) == "Done."
        assert len(stub.requests) == 2

    def test_enter_within_an_input_method_does_not_send(self, page, stub):
        page.fill("#question", "にほん")
        for composing in ({"isComposing": True}, {"keyCode": 229}):
            page.evaluate(
                """(composing) => document.querySelector("#question").dispatchEvent(
                    new KeyboardEvent("keydown", {key: "Enter", bubbles: true, ...composing}))""",
                composing,
            )
        assert page.input_value("#question") == "にほん"
        page.press("#question", "Enter")
        wait_until_answered(page)
        assert len(stub.requests) == 1

    def test_a_dialog_keeps_the_focus_and_gives_it_back(self, page):
        page.focus("#settings-button")
        page.keyboard.press("Enter")
        for _ in range(20):
            page.keyboard.press("Tab")
            assert page.evaluate("document.activeElement.matches('body, dialog *')")
        page.keyboard.press("Escape")
        assert focused(page) == "settings-button"

    def test_the_skip_link_leads_to_the_question(self, page):
        go_to_start(page)
        assert page.evaluate("document.activeElement.getBoundingClientRect().top") >= 0
        page.keyboard.press("Enter")
        assert focused(page) == "question"

    def test_the_announcer_speaks_at_the_end_and_not_with_each_token(self, page, stub):
        page.evaluate("""() => {
            window.spoken = [];
            const node = document.querySelector("#announcer");
            new MutationObserver(() => spoken.push(node.textContent)).observe(node, {childList: true});
        }""")
        stub.replies = [Reply(answer("one two three four five"))]
        ask(page, "count")
        wait_until_answered(page)
        assert page.evaluate("spoken") == ["The model answers.", "Answer: one two three four five"]
        assert page.evaluate("document.querySelector('#messages').closest('[aria-live], [role=log]')") is None

    def test_every_control_has_a_name(self, page, stub):
        ask(page, "hello")
        wait_until_answered(page)
        nameless = page.evaluate("""() => {
            const controls = "button, a, input, textarea, select, dialog, nav";
            const named = (node) => node.ariaLabel || node.getAttribute("aria-labelledby")
                || node.textContent.trim() || node.labels?.[0]?.textContent.trim();
            // A notice and a prompt get their words when they are shown.
            return [...document.querySelectorAll(controls)]
                .filter((node) => !named(node) && !node.closest("#prompt, #notice"))
                .map((node) => node.outerHTML);
        }""")
        assert nameless == []


# https://www.w3.org/TR/WCAG22/#contrast-minimum and #non-text-contrast: how many places, and which fail.
CONTRASTS = """() => {
    const channels = (color) => color.match(/[\\d.]+/g).map(Number);
    const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) =>
        0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const over = ([r, g, b, alpha = 1], below) =>
        [r, g, b].map((value, index) => value * alpha + below[index] * (1 - alpha));
    const background = (node) => node === null ? [255, 255, 255]
        : over(channels(getComputedStyle(node).backgroundColor), background(node.parentElement));
    const ratio = (one, other) => {
        const [dark, light] = [luminance(one), luminance(other)].sort((a, b) => a - b);
        return (light + 0.05) / (dark + 0.05);
    };
    const low = [];
    let count = 0;
    const check = (node, color, least, below) => {
        const found = ratio(over(channels(color), below), below);
        count++;
        if (found < least) low.push(`${node.outerHTML.slice(0, 100)}: ${found.toFixed(2)} < ${least}`);
    };
    for (const node of document.querySelectorAll("body *")) {
        const visible = node.checkVisibility({opacityProperty: true, visibilityProperty: true});
        if (!visible || node.closest(".unseen") || node.localName === "option") continue;
        const style = getComputedStyle(node), size = parseFloat(style.fontSize), below = background(node);
        const isText = (child) => child.nodeType === Node.TEXT_NODE && child.data.trim();
        const large = size >= 24 || size >= 18.66 && Number(style.fontWeight) >= 700;
        if ([...node.childNodes].some(isText) || node.matches("select, input, textarea")) {
            check(node, style.color, large ? 3 : 4.5, below);
        }
        if (node.placeholder) check(node, getComputedStyle(node, "::placeholder").color, 4.5, below);
        if (node.localName === "svg") check(node, style.stroke, 3, below);
        if (node.matches("input, dialog textarea, .editor textarea, .box, .push")) {
            check(node, style.borderTopColor, 3, background(node.parentElement));
        }
    }
    return [count, low];
}"""

TOO_WIDE = """[...document.querySelectorAll("body *")]
    .filter((node) => node.checkVisibility({visibilityProperty: true}))
    .filter((node) => !node.closest("pre, .table, .unseen, .skip"))  // those scroll, or are not seen
    .filter((node) => {
        const {left, right} = node.getBoundingClientRect();
        return left < -0.5 || right > innerWidth + 0.5;
    })
    .map((node) => node.outerHTML.slice(0, 100))"""

TOO_LOW = """(least) => [...document.querySelectorAll("button, select, summary, #conversations a")]
    .filter((node) => node.checkVisibility({visibilityProperty: true}))
    .filter((node) => node.getBoundingClientRect().height < least)
    .map((node) => node.outerHTML)"""

IS_DARK = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).every((value) => value < 100)"

EVERYTHING = """\
# Heading

Text with a [link](https://example.com), `code`, **bold** and ~~deleted~~.

> A quote

```python
print(1)
```

| a | b |
|---|---|
| 1 | 2 |
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
class TestLooks:
    @pytest.fixture
    def page(self, browser, stub, scheme, viewport):
        context = browser.new_context(viewport=viewport, color_scheme=scheme, reduced_motion="reduce")
        context.set_default_timeout(20_000)
        page = open_page(context, stub.address)
        yield page
        assert page.failures == []
        context.close()

    def check(self, page, least=5):
        count, low = page.evaluate(CONTRASTS)
        assert low == []
        assert count >= least
        assert page.evaluate(TOO_WIDE) == []
        for selector in ("html", "#scroll"):
            assert page.locator(selector).evaluate("(node) => node.scrollWidth <= node.clientWidth")

    def test_contrast_and_width(self, page, stub, viewport):
        self.check(page)
        wide = "A" * 300 + " " + "|".join("column" * 3 for _ in range(12))
        thoughts = [chunk(reasoning_content="Hm."), *answer(EVERYTHING + "\n" + "W" * 400, finish="length")]
        stub.replies = [Reply(thoughts), error(503, "loading " * 30)]
        page.click("#settings-button")
        self.check(page)
        page.fill("[name=system]", wide)
        page.click("#settings-dialog .main")
        page.wait_for_selector("#settings-button.changed")
        ask(page, wide)
        wait_until_answered(page)
        page.click(".assistant .thought summary")
        page.hover(".user")
        self.check(page, least=20)
        ask(page, "fails")
        last_failure(page)
        self.check(page, least=20)
        page.evaluate("notify('A notice', 'Do it', () => {})")
        page.locator(".user").last.hover()
        page.locator(".user .edit").last.click()
        self.check(page)
        if viewport == PHONE:
            page.click("#menu")
        self.check(page)
        page.hover("#conversations li")
        page.click("#conversations .delete")
        self.check(page)

    def test_targets_are_large_enough_for_a_finger(self, page, viewport):
        least = 44 if viewport == PHONE else 24
        ask(page, "```\ncode\n```")
        wait_until_answered(page)
        assert page.evaluate(TOO_LOW, least) == []
        if viewport == PHONE:
            page.click("#menu")
            assert page.evaluate(TOO_LOW, least) == []

    def test_the_list_is_a_drawer_on_a_phone(self, page, viewport):
        if viewport != PHONE:
            assert page.locator("#drawer").is_visible()
            assert not page.locator("#menu").is_visible()
            return
        assert not page.locator("#drawer").is_visible()
        page.click("#menu")
        assert focused(page) == "drawer-close"
        assert page.evaluate("document.querySelector('#main').inert")
        page.keyboard.press("Escape")
        assert focused(page) == "menu"
        assert not page.locator("#drawer").is_visible()
        assert not page.evaluate("document.querySelector('#main').inert")

    def test_the_switch_changes_the_theme_and_is_kept(self, page, scheme, viewport):
        assert page.evaluate(IS_DARK) == (scheme == "dark")
        if viewport == PHONE:
            page.click("#menu")
        page.click("#theme")
        assert page.evaluate(IS_DARK) == (scheme != "dark")
        assert page.get_attribute("#theme", "aria-pressed") == json.dumps(scheme != "dark")
        page.reload()
        assert page.evaluate(IS_DARK) == (scheme != "dark")
