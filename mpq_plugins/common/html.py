"""Tables for notebooks: the colours and the font are the page's own, light or dark."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

_RULE = "border-bottom:1px solid rgba(128,128,128,.35);padding:1px 8px"


def html_table(caption: str, header: Sequence[str], rows: Iterable[Sequence[object]], notes: Iterable[str] = ()) -> str:
    """A table with a caption above and notes below, every text escaped; the first column stands left, the others right."""

    def line(cells: Sequence[object], tag: str) -> str:
        sides = ("left", *("right",) * (len(cells) - 1))
        return "".join(
            f'<{tag} style="text-align:{side};{_RULE}">{escape(str(cell))}</{tag}>'
            for side, cell in zip(sides, cells, strict=True)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    below = "".join(f"<div>{escape(note)}</div>" for note in notes)
    head = f'<caption style="caption-side:top;text-align:left">{escape(caption)}</caption><tr>{line(header, "th")}</tr>'
    return f'<div><table style="border-collapse:collapse">{head}{body}</table>{below}</div>'
