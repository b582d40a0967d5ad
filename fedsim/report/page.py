"""The frame of every page: one file, no script, nothing from outside, light or dark as the reader likes it."""

from collections.abc import Iterable, Sequence
from html import escape

from fedsim.report.figures import DARK, FONT, LIGHT

_VARIABLES = "".join(f"--{role}:{colour};" for role, colour in LIGHT.items())
_DARK = "".join(f"--{role}:{colour};" for role, colour in DARK.items())

CSS = f"""
:root{{color-scheme:light dark;{_VARIABLES}--page:#f6f7f9;--card:#fff;--good:#0b7a53;--bad:#c02b2b;--warn:#9a6700}}
@media screen and (prefers-color-scheme:dark){{:root{{{_DARK}--page:#12151a;--card:#1a1e25;--good:#4fd1a0;--bad:#ff8080;
--warn:#e6c35c}}}}
*{{box-sizing:border-box}}
body{{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 {FONT};-webkit-text-size-adjust:100%}}
main{{max-width:1120px;margin:0 auto;padding:40px 24px 64px}}
h1{{font-size:28px;line-height:1.2;letter-spacing:-.015em;margin:0;font-weight:680;overflow-wrap:anywhere}}
h2{{font-size:13px;margin:40px 0 12px;font-weight:650;letter-spacing:.06em;text-transform:uppercase;color:var(--muted)}}
.top{{display:flex;gap:14px;align-items:center;flex-wrap:wrap}}
.sub{{color:var(--muted);margin:6px 0 0;overflow-wrap:anywhere}}
.badge{{font-size:12px;font-weight:650;padding:3px 10px;border-radius:99px;border:1px solid currentColor;
letter-spacing:.02em}}
.completed{{color:var(--good)}} .failed{{color:var(--bad)}} .stopped,.unfinished{{color:var(--warn)}}
.tiles{{display:grid;grid-template-columns:repeat(auto-fill,minmax(190px,1fr));margin-top:28px;
background:var(--card);border:1px solid var(--grid);border-radius:12px;overflow:hidden}}
.tile{{padding:14px 18px 12px;box-shadow:1px 1px 0 var(--grid)}}
.tile b{{display:block;font-size:23px;line-height:1.25;font-weight:620;letter-spacing:-.01em;
font-variant-numeric:tabular-nums;white-space:nowrap}}
.tile span{{font-size:12.5px;color:var(--muted)}}
.grid{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,430px),1fr));gap:16px}}
.card{{background:var(--card);border:1px solid var(--grid);border-radius:12px;padding:14px 16px 10px;margin:0;
min-width:0}}
.wide{{grid-column:1/-1}}
.card svg{{display:block;width:100%;height:auto;font-family:{FONT}}}
.picture{{background:#fff;padding:16px}}
.picture img{{max-width:100%;height:auto;display:block;margin:auto}}
figcaption{{color:var(--muted);font-size:12.5px;margin-top:6px}}
.scroll{{overflow-x:auto}}
table{{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}}
th{{text-align:left;font-weight:600;color:var(--muted);font-size:12.5px}}
th,td{{padding:7px 14px 7px 0;border-bottom:1px solid var(--grid);vertical-align:top}}
tr:last-child td{{border-bottom:0}}
td.n,th.n{{text-align:right;white-space:nowrap}} td.t{{overflow-wrap:anywhere}}
pre,code{{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace;font-size:13px}}
pre{{margin:10px 0 4px;white-space:pre-wrap;overflow-wrap:anywhere;line-height:1.55}}
details{{background:var(--card);border:1px solid var(--grid);border-radius:12px;padding:12px 18px;margin-top:12px}}
summary{{cursor:pointer;font-weight:600}}
.note{{background:var(--card);border:1px solid var(--grid);border-left:4px solid var(--muted);border-radius:8px;
padding:12px 18px;margin-top:20px;white-space:pre-wrap;overflow-wrap:anywhere}}
.note.error{{border-left-color:var(--bad)}} .note.private{{border-left-color:var(--s0)}}
.key{{display:inline-block;width:18px;height:0;border-top:3px solid;vertical-align:middle;margin-right:8px}}
footer{{color:var(--muted);font-size:13px;margin-top:40px;overflow-wrap:anywhere}}
@media print{{
@page{{margin:14mm}}
body{{background:none;font-size:11pt}} main{{padding:0 2px;max-width:none}}
.tiles{{grid-template-columns:repeat(5,1fr)}} .tile{{padding:8px 12px}} .tile b{{font-size:15pt}}
.card,.tile,.note,tr{{break-inside:avoid}} h2{{break-after:avoid}}
.grid{{grid-template-columns:1fr 1fr}}
details::details-content{{content-visibility:visible;block-size:auto}}
*{{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
}}
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole document. The policy in its head makes "nothing from outside" hold even where escaping would fail."""
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "style-src 'unsafe-inline'; img-src data:\">",
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{CSS}</style></head><body><main>",
            *body,
            "</main></body></html>\n",
        ]
    )


def section(title: str, *parts: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>"


def grid(cards: Iterable[str]) -> str:
    return f'<div class="grid">{"".join(cards)}</div>'


def card(svg: str, caption: str = "", *, wide: bool = False) -> str:
    """A figure in its frame."""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure class="card{" wide" if wide else ""}">{svg}{note}</figure>'


def tiles(items: Sequence[tuple[str, str]]) -> str:
    """Key numbers: (label, value)."""
    cells = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(k)}</span></div>' for k, v in items)
    return f'<div class="tiles">{cells}</div>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table of plain text; the columns in ``numeric`` are set flush right."""
    kind = ["n" if i in set(numeric) else "t" for i in range(len(head))]
    top = "".join(f'<th class="{k}">{escape(h)}</th>' for k, h in zip(kind, head, strict=True))
    body = "".join(
        "<tr>" + "".join(f'<td class="{k}">{escape(c)}</td>' for k, c in zip(kind, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f'<div class="card scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def note(text: str, kind: str = "") -> str:
    return f'<div class="note {kind}">{escape(text)}</div>'


def fold(title: str, inner: str) -> str:
    """A part that is closed at first."""
    return f"<details><summary>{escape(title)}</summary>{inner}</details>"


def pre(text: str) -> str:
    return f"<pre>{escape(text)}</pre>"
