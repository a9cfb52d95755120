"""A page of HTML as a test reads it: tags, visible text, and tables."""

import re
from html.parser import HTMLParser


class Page(HTMLParser):
    """Tags with their attributes, and the visible text."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.tags, self.text, self.open = [], [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("style", "title"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and self.open[-1] == tag:
            self.open.pop()

    def handle_data(self, data):
        if not self.open and data.strip():
            self.text.append(data.strip())


def rows_of(html, section, table=0):
    """The cells of one table of a section, as text."""
    part = re.search(rf'<section id="{section}".*?</section>', html, re.S).group()
    body = re.findall(r"<tbody>(.*?)</tbody>", part, re.S)[table]
    clean = [
        re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.S)
        for row in re.findall(r"<tr.*?</tr>", body, re.S)
    ]
    return [[text_of(cell) for cell in row] for row in clean]


def text_of(html):
    """Without tags, and with every run of white space as one space, as a browser shows it."""
    return " ".join(re.sub(r"<[^>]*>", "", html).split())
