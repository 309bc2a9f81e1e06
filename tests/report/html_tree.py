"""A page as a tree of elements, for tests that ask what is in it."""

from collections.abc import Iterator
from html.parser import HTMLParser

VOID = {"meta"}


class Element:
    """An element: its tag, its attributes, and its children, elements and strings."""

    def __init__(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.tag, self.attributes = tag, attributes
        self.children: list[Element | str] = []

    @property
    def raw(self) -> str:
        return "".join(c if isinstance(c, str) else c.raw for c in self.children)

    @property
    def text(self) -> str:
        return " ".join(self.raw.split())

    @property
    def elements(self) -> "list[Element]":
        return [c for c in self.children if isinstance(c, Element)]

    def all(self, tag: str | None = None, **attributes: str) -> "Iterator[Element]":
        """The elements below this one, in order, of this tag and with these attributes (class_: among its classes)."""
        for child in self.elements:
            has = all(v in (child.attributes.get(k.rstrip("_")) or "").split() for k, v in attributes.items())
            if has and tag in (None, child.tag):
                yield child
            yield from child.all(tag, **attributes)


class _Builder(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("root", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(self.open[-1].elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} is there twice"
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"{tag} is closed where another is open"

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def parse(text: str) -> Element:
    """The page's root. A tag that is not closed where it should be fails an assertion."""
    builder = _Builder()
    builder.feed(text)
    builder.close()
    (root,) = builder.open
    return root


def table(root: Element, name: str = "configurations") -> list[dict[str, str]]:
    """The rows of the table of this class, as {header with unit: cell}."""
    (found,) = root.all("table", class_=name)
    head, *rows = [[cell.text for cell in row.elements] for row in found.all("tr")]
    assert len(set(head)) == len(head)
    return [dict(zip(head, row, strict=True)) for row in rows]


def sections(root: Element) -> dict[str, str]:
    """The text of the main part by its headings."""
    (body,) = root.all("main")
    found, heading = {}, None
    for child in body.elements:
        if child.tag == "h2":
            heading = child.text
        else:
            found[heading] = f"{found.get(heading, '')} {child.text}".strip()
    return found
