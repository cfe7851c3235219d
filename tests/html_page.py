"""A page as the tests read it: whether its tags balance, what it would load, its text and numbers."""

from html.parser import HTMLParser

_VOID = {"meta", "br", "img", "link", "input", "hr", "line", "circle", "polyline", "polygon"}
_LOADING = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}


class Page(HTMLParser):
    """Checks that tags balance and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.values: list[float] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.links += [value for name, value in attrs if name in _LOADING]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag == "data":
            self.values.append(float(dict(attrs)["value"]))
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data
