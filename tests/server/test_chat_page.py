"""The chat page in Chromium, under the strictest policy that a server can send."""

import base64
import json
import re
import threading

import pytest
from chat_page import (
    ask,
    check_conversation,
    last_failure,
    open_page,
    questions,
    wait_until,
    wait_until_answered,
)
from chat_stub import PAGE, ChatStub, Reply, answer, chunk, endless, error, event


class TestTheFile:
    def test_it_has_one_style_one_script_and_no_attribute_that_is_one(self):
        text = PAGE.read_text(encoding="utf-8")
        assert [text.count(tag) for tag in ("<style", "<script", "<link", "src=", "@import")] == [
            1,
            1,
            1,
            0,
            0,
        ]
        markup = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL)
        assert not re.findall(r"\s(?:style|on\w+)=", markup)
        assert not re.findall(r"https?://", markup.replace("http://www.w3.org/2000/svg", ""))

    def test_nothing_makes_markup_or_code_of_text(self):
        forbidden = (
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function|srcdoc"
        )
        assert not re.findall(forbidden, PAGE.read_text(encoding="utf-8"))


class TestConversation:
    def test_ask_stop_regenerate_edit_and_reload(self, page, stub):
        stub.replies = [Reply(answer("A list holds items.")), Reply(endless()), Reply(endless())]
        check_conversation(page)

    def test_a_request_carries_history_and_settings_and_only_those_that_were_set(self, page, stub):
        stub.replies = [Reply(answer("One.")), Reply(answer("Two."))]
        page.click("#settings-button")
        page.fill("[name=system]", "Be brief.")
        page.fill("[name=temperature]", "0.5")
        page.fill("[name=seed]", "7")
        page.click("#settings-dialog .main")
        page.wait_for_selector("#settings-button.changed")
        ask(page, "first")
        wait_until_answered(page)
        ask(page, "second")
        wait_until_answered(page)
        assert stub.requests[1][1] == {
            "model": "lumi-small",
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "first"},
                {"role": "assistant", "content": "One."},
                {"role": "user", "content": "second"},
            ],
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": 0.5,
            "seed": 7,
        }
        assert "Be brief." in page.inner_text("#messages")
        page.click("#new")
        ask(page, "other")
        wait_until_answered(page)
        assert stub.requests[2][1].keys() == {"model", "messages", "stream", "stream_options"}

    def test_one_of_several_models_is_chosen(self, context, stub):
        models = [{"id": "one"}, {"id": "two", "max_model_len": 99}]
        stub.models = Reply([json.dumps({"data": models}).encode()])
        page = open_page(context, stub.address)
        page.select_option("#model", "two")
        ask(page, "hello")
        wait_until_answered(page)
        assert stub.requests[0][1]["model"] == "two"
        assert "of 99 tokens" in page.inner_text("#context")

    def test_a_setting_out_of_range_is_not_taken(self, page):
        page.click("#settings-button")
        page.fill("[name=temperature]", "3")
        page.click("#settings-dialog .main")
        assert page.locator("#settings-dialog[open]").count() == 1
        assert page.evaluate("document.querySelector('[name=temperature]').validity.rangeOverflow")

    def test_the_tokens_are_the_servers_count_and_a_limit_is_shown(self, page, stub):
        stub.replies = [Reply(answer("one two three", finish="length", seconds=0.05, prompt_tokens=30))]
        ask(page, "count")
        wait_until_answered(page)
        stats = page.inner_text(".assistant .stats")
        assert re.fullmatch(r"3 tokens · [\d.]+ tokens/s", stats)
        assert page.inner_text(".assistant .badge") == "Cut at the limit of tokens"
        assert page.inner_text("#context") == "33 of 2048 tokens of context"

    def test_the_pace_is_that_of_the_tokens_after_the_first(self, page):
        rate = page.evaluate("""() => {
            const now = performance.now, message = {content: ""}, clock = {first: null};
            let time = 5000;
            performance.now = () => (time += 100);
            const delta = (content) => JSON.stringify({choices: [{delta: {content}}]});
            for (const word of ["a", "b", "c"]) takeChunk(message, delta(word), clock);
            const usage = {completion_tokens: 5, total_tokens: 9};
            takeChunk(message, JSON.stringify({choices: [], usage}), clock);
            performance.now = now;
            return message.rate;
        }""")
        assert rate == pytest.approx((5 - 1) / 0.2)  # the server counts 5 tokens, 200 ms from first to last

    def test_rename_and_delete(self, page, stub):
        ask(page, "What is this?")
        wait_until_answered(page)
        page.hover("#conversations li")
        page.click(".rename")
        assert page.input_value("#prompt input") == "What is this?"
        page.fill("#prompt input", "A name")
        page.keyboard.press("Enter")
        page.wait_for_selector("#conversations a >> text=A name")
        assert page.inner_text("#title") == "A name"
        page.hover("#conversations li")
        page.click(".delete")
        page.click("#prompt .cancel")
        page.wait_for_selector("#prompt", state="hidden")
        assert page.locator("#conversations a").count() == 1
        page.hover("#conversations li")
        page.click(".delete")
        page.click("#prompt .main")
        page.wait_for_selector("#conversations .none")
        assert page.locator("#conversations a").count() == 0
        assert page.locator("#welcome").is_visible()
        page.reload()
        assert page.locator("#conversations a").count() == 0

    def test_an_answer_goes_on_while_another_conversation_is_open(self, page, stub):
        gate = threading.Event()

        def pieces():
            yield chunk("begun ")
            gate.wait(20)
            yield from answer("and ended")

        stub.replies = [Reply(pieces()), Reply(answer("Quick."))]
        ask(page, "slow")
        page.wait_for_selector("text=begun")
        page.click("#new")
        ask(page, "quick")
        assert wait_until_answered(page) == "Quick."
        gate.set()
        wait_until(page, "document.querySelectorAll('#conversations .running').length === 0")
        page.go_back()
        page.click("#conversations a[title=slow]")
        assert wait_until_answered(page) == "begun and ended"

    def test_copying_gives_the_text_that_the_model_wrote(self, page, context, stub):
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        stub.replies = [Reply(answer("**Bold**\n\n```py\nx = 1\n  y\n```"))]
        ask(page, "code")
        wait_until_answered(page)
        page.click(".copy-code")
        assert page.evaluate("navigator.clipboard.readText()") == "x = 1\n  y"
        page.click(".assistant .copy")
        assert page.evaluate("navigator.clipboard.readText()") == "**Bold**\n\n```py\nx = 1\n  y\n```"

    def test_copying_without_the_clipboards_interface(self, page, context, stub):
        """As over plain HTTP from another machine."""
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        stub.replies = [Reply(answer("words"))]
        ask(page, "code")
        wait_until_answered(page)
        page.evaluate("""() => {
            window.kept = navigator.clipboard;
            Object.defineProperty(navigator, "clipboard", {value: undefined, configurable: true});
        }""")
        page.click(".assistant .copy")
        wait_until(page, "document.querySelector('#announcer').textContent === 'Copied.'")
        assert page.evaluate("window.kept.readText()") == "words"

    def test_thoughts_are_apart_from_the_answer(self, page, stub):
        pieces = [chunk(reasoning_content="I think."), chunk("So."), chunk(finish="stop"), event("[DONE]")]
        stub.replies = [Reply(pieces), Reply(answer("<think>\nHm.\n</think>\n\nYes."))]
        for thought, said in (("I think.", "So."), ("Hm.", "Yes.")):
            ask(page, "why")
            assert wait_until_answered(page) == said
            page.click(".message:last-child summary")
            assert page.inner_text(".message:last-child .thought div") == thought

    def test_the_view_follows_only_at_its_end(self, page, stub):
        gate = threading.Event()

        def pieces():
            yield chunk("line\n\n" * 60)
            gate.wait(20)
            yield from answer("word\n\n" * 60)

        stub.replies = [Reply(pieces())]
        ask(page, "long")
        at_end = """(() => {
            const view = document.querySelector("#scroll");
            return view.scrollHeight - view.clientHeight - view.scrollTop < 8;
        })()"""
        wait_until(page, "document.querySelectorAll('.content p').length === 60")
        wait_until(page, at_end)
        page.hover("#scroll")
        page.mouse.wheel(0, -300)
        wait_until(page, "!document.querySelector('#jump').hidden")
        top = page.evaluate("document.querySelector('#scroll').scrollTop")
        gate.set()
        wait_until_answered(page)
        assert page.evaluate("document.querySelector('#scroll').scrollTop") == top
        page.click("#jump")
        wait_until(page, at_end)

    def test_nothing_leaves_the_origin(self, context, stub):
        addresses = []
        context.on("request", lambda request: addresses.append(request.url))
        page = open_page(context, stub.address)
        stub.replies = [
            Reply(answer("![x](http://127.0.0.2:1/x.png) <img src=//127.0.0.2:1/y.png> https://example.com"))
        ]
        ask(page, "images")
        wait_until_answered(page)
        assert addresses
        assert all(url.startswith((stub.address, "data:")) for url in addresses)


class TestErrors:
    def test_a_key_is_asked_for_kept_for_the_tab_and_sent(self, context, stub):
        stub.key = "secret"
        page = context.new_page()
        page.goto(stub.address)
        page.wait_for_selector("#prompt[open]")
        for key in ("wrong", "secret"):
            page.fill("#prompt input", key)
            page.click("#prompt .main")
            wait_until(page, "document.querySelector('#prompt input').value === ''")
        wait_until(page, "document.querySelector('#model').value === 'lumi-small'")
        page.reload()
        wait_until(page, "document.querySelector('#model').value === 'lumi-small'")
        ask(page, "hello")
        wait_until_answered(page)
        assert stub.requests[0][0]["Authorization"] == "Bearer secret"
        assert page.evaluate("JSON.stringify(localStorage).includes('secret')") is False

    def test_a_key_that_is_refused_later_is_asked_for_again(self, page, stub):
        stub.key = "new"
        ask(page, "hello")
        page.wait_for_selector("#prompt[open]")
        page.fill("#prompt input", "new")
        page.keyboard.press("Enter")
        page.wait_for_selector(".assistant >> text=removes the white space")
        assert page.locator(".failure:visible").count() == 0

    @pytest.mark.parametrize(
        ("reply", "says"),
        [
            (error(429, "too many", Retry_After="7"), r"busy.* in 7 seconds"),
            (error(429, "too many"), r"busy.* in a moment"),
            (error(503, "model is loading", kind="server_error"), r"not ready.*model is loading"),
            (
                error(400, "4000 tokens", code="context_length_exceeded"),
                r"2048 tokens.*new chat.*4000 tokens",
            ),
            (error(400, "temperature must be less than 2"), r"^temperature must be less than 2$"),
            (Reply([b"<html>Bad gateway"], 502, {"Content-Type": "text/html"}), r"status 502"),
            (Reply([event({"error": {"message": "out of memory", "code": 500}})]), r"^out of memory$"),
            (
                Reply([event({"error": {"message": "4000 tokens", "code": "context_length_exceeded"}})]),
                r"new chat",
            ),
            (Reply([b"data: {\n\n"]), r"not JSON"),
            (Reply([chunk("half")]), r"ended before"),
        ],
    )
    def test_an_error_says_what_happened_and_can_be_tried_again(self, page, stub, reply, says):
        stub.replies = [reply, Reply(answer("Now."))]
        ask(page, "hello")
        assert re.search(says, last_failure(page), re.DOTALL)
        assert re.search(says, page.inner_text("#announcer"), re.DOTALL)
        page.click(".failure button:visible")
        assert wait_until_answered(page) == "Now."
        assert page.locator(".failure:visible").count() == 0
        assert stub.requests[1][1] == stub.requests[0][1]

    def test_what_came_before_an_error_stays(self, page, stub):
        stub.replies = [Reply([chunk("The first half"), event({"error": {"message": "lost"}})])]
        ask(page, "hello")
        assert last_failure(page) == "lost"
        page.reload()
        assert page.inner_text(".assistant .content") == "The first half"
        assert last_failure(page) == "lost"

    def test_a_question_after_a_failure_goes_with_the_one_before(self, page, stub):
        """Templates refuse two messages of the user in a row."""
        stub.replies = [error(503, "loading")]
        ask(page, "one")
        last_failure(page)
        ask(page, "two")
        wait_until_answered(page)
        assert stub.requests[1][1]["messages"] == [{"role": "user", "content": "one\n\ntwo"}]

    def test_a_server_that_is_not_ready_can_be_tried_again(self, context, stub):
        stub.models = error(503, "loading")
        page = context.new_page()
        page.goto(stub.address)
        page.wait_for_selector("#notice >> text=not ready")
        stub.models = None
        page.click("#notice .push")
        wait_until(page, "document.querySelector('#model').value === 'lumi-small'")
        assert not page.locator("#notice").is_visible()

    def test_a_server_that_is_gone(self, context):
        with ChatStub() as stub:
            page = open_page(context, stub.address)
        ask(page, "hello")
        assert "cannot be reached" in last_failure(page)
        assert questions(page) == ["hello"]


class TestStream:
    TEXTS = ("data: {\"a\": \"é漢😀\"}\r\n\r\n: a comment\n\ndata:one\ndata: two\n\nevent: x\n\n"
             "data: 1\r\ndata: 2\r\n\r\ndata: cr\r\r"
             "data:  spaces \n\ndata: [DONE]\n\ndata: last")  # fmt: skip
    EVENTS = ('{"a": "é漢😀"}', "one\ntwo", "1\n2", "cr", " spaces ", "[DONE]", "last")
    READ = """async (pieces) => {
        const bytes = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
        const read = [];
        for (const cut of pieces) {
            const stream = new ReadableStream({ start(controller) {
                for (const piece of cut) controller.enqueue(bytes(piece));
                controller.close();
            }});
            const events = [];
            for await (const data of readEvents(stream)) events.push(data);
            read.push(events);
        }
        return read;
    }"""

    def test_a_stream_may_be_cut_anywhere(self, page):
        raw = self.TEXTS.encode()
        cuts = [[raw[:at], raw[at:]] for at in range(len(raw) + 1)]
        cuts.append([raw[at : at + 1] for at in range(len(raw))])
        coded = [[base64.b64encode(piece).decode() for piece in cut] for cut in cuts]
        read = page.evaluate(self.READ, coded)
        assert [tuple(events) for events in read] == [self.EVENTS] * len(cuts)

    def test_stopping_ends_the_request(self, page, stub):
        stub.replies = [Reply(endless())]
        ask(page, "on and on")
        page.wait_for_selector("text=more more")
        page.click("#stop")
        wait_until_answered(page)
        assert stub.hung_up.wait(20)


class TestStorage:
    def test_what_came_before_the_page_was_closed_is_kept(self, page, stub):
        stub.replies = [Reply(endless())]
        ask(page, "on and on")
        page.wait_for_selector("text=more more")
        page.reload()
        assert "more more" in page.inner_text(".assistant .content")
        assert page.inner_text(".assistant .badge") == "Stopped"
        assert page.locator(".again").is_visible()

    def test_damaged_conversations_are_told_and_the_others_stay(self, page):
        ask(page, "kept")
        wait_until_answered(page)
        page.evaluate("""() => {
            const prefix = "lumi.conversation.";
            for (const [key, value] of [["a", "{"], ["b", "null"], ["c", '{"id": "c", "messages": 3}'],
                ["d", '{"id": "d", "messages": [{"role": "root", "content": "x"}]}'],
                ["e", '{"id": "e", "messages": [{"role": "user", "content": {}}]}'],
                ["f", '{"id": "other", "messages": []}']]) localStorage.setItem(prefix + key, value);
            localStorage.setItem("lumi.theme", "<b>");
        }""")
        page.reload()
        page.wait_for_selector("#model:not(:has(option[value='']))")
        assert page.locator("#notice").is_visible()
        assert "6 of the stored" in page.inner_text("#notice span")
        assert page.locator("#conversations a").all_inner_texts() == ["kept"]
        ask(page, "it works")
        wait_until_answered(page)

    def test_fields_of_the_wrong_kind_are_left_out(self, page):
        page.evaluate("""() => localStorage.setItem("lumi.conversation.x", JSON.stringify({
            id: "x", name: 5, updated: "never", system: ["s"], sampling: {seed: "a", top_p: 0.5, tokens: 1},
            messages: [{role: "user", content: "hello"},
                       {role: "assistant", content: "hi", rate: "a", tokens: {}, finish: 3, error: {}}]}))""")
        page.reload()
        page.click("#conversations a")
        assert page.inner_text("#title") == "hello"
        assert page.inner_text(".assistant .content") == "hi"
        assert page.evaluate("current.sampling") == {"top_p": 0.5}

    def test_a_full_storage_is_told(self, page):
        page.evaluate("""() => {
            for (let size = 1 << 22, at = 0; size; at++) {
                try { localStorage.setItem("x" + at, "x".repeat(size)); } catch { size >>= 1; }
            }
        }""")
        ask(page, "hello")
        assert "dedent" in wait_until_answered(page)
        assert "storage is full" in page.inner_text("#notice")

    def test_a_browser_that_forbids_storage(self, context, stub):
        context.add_init_script("""for (const name of ["localStorage", "sessionStorage"])
            Object.defineProperty(window, name, {get() { throw new DOMException("", "SecurityError"); }});""")
        page = open_page(context, stub.address)
        ask(page, "hello")
        assert "dedent" in wait_until_answered(page)
        page.click("#theme")
        assert "forbidden" in page.inner_text("#notice")
        assert page.failures == []

    def test_two_tabs_agree(self, page, context, stub):
        ask(page, "first")
        wait_until_answered(page)
        other = open_page(context, page.url)
        ask(other, "second")
        wait_until_answered(other)
        wait_until(page, "document.querySelectorAll('.user').length === 2")
        assert questions(page) == ["first", "second"]
