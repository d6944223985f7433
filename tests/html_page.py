"""A page as a browser reads it."""

from html.parser import HTMLParser

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that tags nest; keeps tags, attributes and text."""

    def __init__(self, path):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], []
        self.source = path.read_text(encoding="utf-8")
        self.feed(self.source)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def has(self, text):
        return any(text in " ".join(piece.split()) for piece in self.text)

    def needs_nothing_else(self):
        """Whether it has no scripts and asks for no other file."""
        return (
            not {"script", "link", "img", "iframe", "object"} & set(self.tags)
            and not {name for name, _ in self.attributes} & {"src", "href", "onload", "srcset"}
            and not any(word in self.source for word in ("url(", "@import"))
            and ("content", "default-src 'none'; style-src 'unsafe-inline'") in self.attributes
        )
