"""Markdown in the chat page: what CommonMark says, nothing but text of hostile text, and linear work."""

import pytest
from chat_page import ask, wait_until_answered
from chat_stub import Reply, answer
from markdown_it import MarkdownIt

HOSTILE = """\
<img src=x onerror="window.ran = 1"> <script>window.ran = 1</script> <b>bold</b>

[script](javascript:window.ran=1) [data](data:text/html,<script>window.ran=1</script>) [v](vbscript:x)
[tab](java\tscript:x) [case](JaVaScRiPt:window.ran=1) ![image](http://127.0.0.2:1/x.png) <javascript:alert(1)>
[quote](http://x.test/"onmouseover="window.ran=1) [file](file:///etc/passwd) [relative](/v1/models)

> <svg onload=window.ran=1> <iframe src=javascript:window.ran=1>

| <style>*{display:none}</style> | <form action=//x.test> |
|---|---|
| <input autofocus onfocus=window.ran=1> | &lt;img src=x onerror=window.ran=1&gt; |

```html"><img src=x onerror=window.ran=1>
</code></pre><script>window.ran = 1</script>
```
"""

SAMPLES = {
    "paragraphs": "One *two* **three** ***four*** `five` ~~six~~\n\nseven_eight_nine __ten__ _eleven_",
    "not emphasis": "2 * 3 * 4, *args and **kwargs, snake_case_name, a ** b, ****, __init__.py",
    "nested emphasis": "**bold with *italic* in it** and *italic with **bold** in it* and **`code`**",
    "code spans": "`` a ` b `` and `` ` `` and `unclosed and ``unclosed",
    "escapes": r"\*not\* \`code\` \[x\](y) \\ and C:\dir",
    "headings": "# One\n\n## Two *x*\ntext\n#### Four\n#no heading\n####### seven",
    "rules": "a\n\n---\n\n***\n\n- - -\n\nb",
    "fences": "before\n```py\ndef f():\n    return `1`\n\n```\nafter\n~~~\n```\n~~~",
    "longer fence": "````\n```\ninner\n```\n````",
    "unclosed fence": "text\n\n```js\nlet a;\n\n- no list",
    "indented code": "text\n\n    code\n      more\n\n    last\n\ntext",
    "lists": "- a\n- b\n\n  second paragraph\n- c\n\n1. x\n2. y",
    "nested lists": "1. one\n   - two\n     - three\n   - four\n2. five\n   ```\n   code\n   ```\n3. six",
    "list start": "5. five\n6. six",
    "lazy lines": "- a\nlazy\n- b",
    "list then text": "- a\n- b\n\ntext",
    "quotes": "> a\n> b\n>\n> - c\n>   > d\n\ntext",
    "tables": "| a | b | c |\n|:--|:-:|--:|\n| 1 | `x\\|y` | **3** |\n| 4 | 5 | 6 |\n\nafter",
    "table after text": "text:\n\na|b\n-|-\n1|2",
    "links": "[a *b*](https://x.test/p?q=1&r=2) [p](http://x.test/a_(b)) [t](https://x.test \"title\")",
    "angle links": "<https://y.test/?a=1> and <no link>",
    "no links": "[a] [b](c d) (x) ](y)",
}  # fmt: skip

# The page and CommonMark agree to differ: headings are two levels lower, code and tables have a frame, the
# markup of deleted text is another, and paragraphs in lists are not told from lines.
OUTLINE = """(root) => {
    const children = (node) => [...node.childNodes].map(outline).join("");
    const code = (language, node) => `{pre ${language}|${node.textContent.trimEnd()}}`;
    const outline = (node) => {
        if (node.nodeType === Node.TEXT_NODE) return node.data;
        let name = node.localName === "s" ? "del" : node.localName;
        if (name === "div" || node.matches("li > p")) return children(node) + " ";
        if (name === "figure") {
            return code(node.querySelector("span").textContent, node.querySelector("code"));
        }
        if (name === "pre") return code((node.firstChild.className || "language-text").slice(9), node);
        const heading = /^h([1-6])$/.exec(name);
        if (heading) name = "h" + Math.min(6, Number(heading[1]) + (root.localName === "body" ? 2 : 0));
        const start = name === "ol" ? node.start : "";
        return `{${name}${node.getAttribute("href") ?? start}|${children(node)}}`;
    };
    return children(root).replace(/\\s+/g, " ").replace(/ ?([{}|]) ?/g, "$1").trim();
}"""

# What a model's text may become.
ELEMENTS = """
    p a ul ol li h3 h4 h5 h6 blockquote figure figcaption span button pre code div table thead tbody tr th td
    em strong del hr
""".split()
ATTRIBUTES = """
    a:href a:title a:target a:rel button:class button:type figure:class div:class div:tabindex pre:tabindex
""".split()

REPETITIONS = """
    * [ ` > _a [a]( [a](http://x ![[ `a`` | |- ( http:// \\ < ~~a ***a [a](http://x( *a* ****a <http://x
""".split()
REPETITIONS += ["> ", "- ", "*a ", "**a *b ", "a\n> ", "-\n", "1. a\n", "- a\n  ", "> - ", "# ", "\t"]
REPETITIONS += ["| a |\n|---|\n"]
LINES = [
    "a | b\n" + "-" * 200_000 + "x",
    "http://" + ")" * 200_000,
    "`" + " a" * 100_000 + " `",
    "[" + "a" * 200_000,
    "[a](http://" + "(" * 200_000,
]


class TestMarkdown:
    def render(self, page, text):
        page.evaluate("""(text) => {
            window.target = document.createElement("div");
            target.className = "markdown";
            document.querySelector("#scroll").append(target);
            renderMarkdown(target, text);
        }""", text)  # fmt: skip
        return page.evaluate_handle("target")

    @pytest.mark.parametrize("text", SAMPLES.values(), ids=SAMPLES)
    def test_it_is_what_commonmark_gives(self, page, text):
        ours = self.render(page, text).evaluate(OUTLINE)
        html = MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"]).render(text)
        parsed = page.evaluate_handle(
            "(html) => new DOMParser().parseFromString(html, 'text/html').body", html
        )
        assert ours == parsed.evaluate(OUTLINE)

    def test_bare_links_end_before_the_sentence_does(self, page):
        target = self.render(page, "See https://x.test/a_(b). (Or http://y.test/c?d=1!) nohttps://z.test")
        links = target.evaluate("(target) => [...target.querySelectorAll('a')].map((link) => link.href)")
        assert links == ["https://x.test/a_(b)", "http://y.test/c?d=1"]

    def test_hostile_text_stays_text(self, page, stub):
        stub.replies = [Reply(answer(HOSTILE))]
        ask(page, HOSTILE)
        wait_until_answered(page)
        names = page.evaluate("[...document.querySelectorAll('.content *')].map((node) => node.localName)")
        assert set(names) <= set(ELEMENTS)
        attributes = page.evaluate("""[...document.querySelectorAll('.content *')].flatMap((node) =>
            node.getAttributeNames().map((name) => node.localName + ":" + name))""")
        assert set(attributes) <= set(ATTRIBUTES)
        links = page.evaluate(
            "[...document.querySelectorAll('.content a')].map((link) => [link.href, link.title, link.rel])"
        )
        assert [href for href, _, _ in links] == [
            "http://127.0.0.2:1/x.png",
            "http://x.test/%22onmouseover=%22window.ran=1",
        ]
        assert {rel for _, _, rel in links} == {"noopener noreferrer"}
        assert all(title.startswith("http://") for _, title, _ in links)
        assert page.evaluate("window.ran") is None
        assert page.inner_text(".user .content") == HOSTILE
        for piece in (
            "<script>window.ran = 1</script>",
            "[script](javascript:window.ran=1)",
            "<svg onload=window.ran=1>",
        ):
            assert piece in page.inner_text(".assistant .content")

    def sizes(self, page, text):
        """(elements, depth) of a rendered text. 20 seconds are far more than linear work takes."""
        page.evaluate(
            """(text) => setTimeout(() => {
                const target = document.createElement("div");
                renderMarkdown(target, text);
                let depth = 0;
                for (let node = target; node; node = node.lastElementChild) depth++;
                window.sizes = [target.querySelectorAll("*").length, depth];
                document.querySelector("#announcer").textContent = "rendered";
            })""",
            text,
        )
        page.wait_for_selector("#announcer >> text=rendered", state="attached", timeout=20_000)
        return page.evaluate("window.sizes")

    @pytest.mark.parametrize("ending", ["", "x", "\n", ")" * 1000], ids=["bare", "x", "line", "closed"])
    @pytest.mark.parametrize("unit", REPETITIONS)
    def test_hostile_repetitions_end(self, page, unit, ending):
        """200 KB of one thing. The elements are no more than the text has places for them, and not deep."""
        elements, depth = self.sizes(page, unit * (200_000 // len(unit)) + ending)
        assert elements <= 4 * 200_000 / len(unit) + 30
        assert depth < 60

    @pytest.mark.parametrize("text", LINES, ids=lambda text: text[:12])
    def test_hostile_lines_end(self, page, text):
        elements, _ = self.sizes(page, text)
        assert elements < 10

    def test_blocks_that_did_not_change_stay(self, page):
        handle = self.render(page, "one\n\ntwo")
        page.evaluate(
            "() => { window.first = target.firstChild; renderMarkdown(target, 'one\\n\\ntwo and more'); }"
        )
        assert handle.evaluate("(target) => target.firstChild === window.first")
        assert handle.inner_text() == "one\n\ntwo and more"

    def test_a_frame_renders_the_last_answer_alone_and_once(self, page, stub):
        ask(page, "first")
        wait_until_answered(page)
        calls = page.evaluate("""async () => {
            const original = renderMarkdown, calls = [];
            renderMarkdown = (target, text) => { calls.push(text); original(target, text); };
            current.messages.at(-1).content = "changed";
            for (let times = 0; times < 100; times++) refreshSoon();
            await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
            renderMarkdown = original;
            return calls;
        }""")
        assert calls == ["changed"]
