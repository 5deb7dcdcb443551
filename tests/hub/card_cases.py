"""Texts that try to be markup, and what tells a card's markup from what it says."""

from hypothesis import strategies as st
from markdown_it import MarkdownIt

from lcpatch.hub.card_files import parts
from lcpatch.hub.escape import clean


def kinds(card: str) -> list:
    """The Markdown elements of a card, without what they say."""

    def below(token) -> list:
        found = [t.type for t in token.children or []]
        return [t for n, t in enumerate(found) if t != "text" or n == 0 or found[n - 1] != "text"]

    tokens = MarkdownIt("commonmark", {"html": True}).enable("table").parse(parts(card)[1])
    return [(t.type, t.tag, below(t)) for t in tokens]


HOSTILE = [
    "<script>alert(1)</script>", "a | b", "`code`", "``` ```", "- x", "+ x", "1. x", "![x](http://x/y.png)", "---",
    "&lt;", "**x**", "<!-- x", "{{ x }}", "{% x %}", "\\", "\\|", "[x]: y", "$x$", "~~~", "    x", "> x", "===",
    "# x", "a: b", "x\n\n# y", "\n---\n", "\u202e", "|", "x\u2028# y", "<http://x>",
]  # fmt: skip
PARTS = st.text(max_size=12) | st.sampled_from(HOSTILE)
TEXTS = st.tuples(PARTS, PARTS).map("".join).filter(clean)
