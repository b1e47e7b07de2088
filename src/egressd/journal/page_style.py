"""The page's one style sheet. No file, font or picture from anywhere: the page's CSP admits this text by its
hash.

Colours are custom properties: a light set, a dark set where the reader's system asks for one, and always the
light set on paper. All pairs of text and ground have a contrast of 4.5 or more (WCAG 2.2, 1.4.3), bars and
lines 3 (1.4.11); a test computes them from this text.
"""

from __future__ import annotations

__all__ = ["STYLE"]

# Rows as cards, each cell with its heading before it. Tables of seven columns (`wide`) need it earlier than
# the rest.
_CARDS = """
  table@, @ tbody, @ tfoot, @ tr, @ th, @ td, @ caption { display: block; }
  @ thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%);
    white-space: nowrap; }
  @ tr { border-bottom: 1px solid var(--line); padding: 0.45rem 0; }
  @ tfoot tr { border-top: 2px solid var(--line); border-bottom: 0; }
  @ th, @ td, @ tfoot th, @ tfoot td { border: 0; padding: 0.1rem 0; }
  @ td, @ tfoot td { padding-left: 7.6rem; position: relative; min-height: 1.5em; text-align: left; }
  @ td:empty { display: none; }
  @ td::before { content: attr(data-label); position: absolute; left: 0; width: 7.2rem; color: var(--muted);
    font-weight: 400; }
"""


def _narrow(css: str, below: str) -> str:
    return f"@media screen and (max-width: {below}) {{{_CARDS.replace('@', f'.{css}')}}}\n"


STYLE = """
:root {
  color-scheme: light dark;
  --ground: #ffffff; --raised: #f4f5f7; --text: #1b1f24; --muted: #57606a; --line: #c9d0d8; --link: #0b57c2;
  --good: #14622f; --good-ground: #e3f4e8; --bad: #a11420; --bad-ground: #fdeaec; --note: #7a4a00;
  --note-ground: #fdf3dc;
  --sent: #1f66b8; --received: #0f7a6c; --refused: #c2333f; --other: #6b5aa8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171c; --raised: #1e232a; --text: #e6e9ed; --muted: #a3adb8; --line: #3d4651; --link: #86b7ff;
    --good: #86dba0; --good-ground: #15301f; --bad: #ff9aa2; --bad-ground: #3b171b; --note: #f2c66d;
    --note-ground: #33270d;
    --sent: #5b9bea; --received: #3fb8a5; --refused: #f0757f; --other: #a695e0;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 1.5rem clamp(0.9rem, 3vw, 2.5rem) 4rem; max-width: 84rem;
  background: var(--ground);
  color: var(--text); font: 1rem/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  overflow-wrap: anywhere;
}
h1, h2, h3 { line-height: 1.25; text-wrap: balance; overflow-wrap: anywhere; }
h1 { font-size: clamp(1.4rem, 1.1rem + 1.6vw, 2.1rem); margin: 0.4rem 0 0.6rem; }
h2 { font-size: 1.3rem; margin: 0 0 0.6rem; padding-top: 0.6rem; border-top: 2px solid var(--line); }
h3 { font-size: 1.02rem; margin: 1.2rem 0 0.4rem; }
p, ul, ol, dl { margin: 0.4rem 0 0.8rem; max-width: 52rem; }
li { margin: 0.15rem 0; }
section { margin-top: 2.4rem; }
a { color: var(--link); }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
code, pre, .mono { font-family: ui-monospace, "Cascadia Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: 0.88em; }
code, .mono { unicode-bidi: isolate; }
pre {
  background: var(--raised); border: 1px solid var(--line); border-radius: 6px; padding: 0.8rem;
  margin: 0.4rem 0 0.8rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
.muted { color: var(--muted); }
.small { font-size: 0.88rem; }
.kicker { margin: 0; color: var(--muted); font-size: 0.95rem; }
.verdict { display: inline-block; margin: 0 0 0.3rem; padding: 0.2rem 0.7rem; border: 2px solid;
  border-radius: 6px; font-weight: 700; }
.good { color: var(--good); background: var(--good-ground); }
.bad { color: var(--bad); background: var(--bad-ground); }
.note { color: var(--note); background: var(--note-ground); }
.box { border: 1px solid; border-left-width: 6px; border-radius: 6px; padding: 0.6rem 1rem; margin: 0.8rem 0;
  max-width: 60rem; }
.box p, .box ul { margin: 0.2rem 0; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: 0.7rem;
  margin: 1.2rem 0; max-width: none; }
.figures > div { background: var(--raised); border: 1px solid var(--line); border-radius: 6px;
  padding: 0.55rem 0.8rem; }
.figures dt { color: var(--muted); font-size: 0.88rem; }
.figures dd { margin: 0; font-size: 1.25rem; font-weight: 650; line-height: 1.3; }
.figures dd span { display: block; font-size: 0.82rem; font-weight: 400; color: var(--muted); }
dl.facts { display: grid; grid-template-columns: minmax(8rem, max-content) 1fr; gap: 0.25rem 1.2rem;
  max-width: 64rem; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; min-width: 0; }
nav { font-size: 0.92rem; margin: 1rem 0 0; }
nav ul { list-style: none; padding: 0; margin: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.1rem;
  max-width: none; }
nav a { display: inline-block; padding: 0.15rem 0; }
table { border-collapse: collapse; width: 100%; margin: 0.6rem 0 0.4rem; font-size: 0.92rem;
  font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--muted); font-size: 0.88rem; padding-bottom: 0.35rem; }
th, td { text-align: left; vertical-align: top; padding: 0.38rem 0.9rem 0.38rem 0;
  border-bottom: 1px solid var(--line); }
thead th { color: var(--muted); font-weight: 600; border-bottom: 2px solid var(--line);
  vertical-align: bottom; overflow-wrap: normal; }
tbody th { font-weight: 600; }
th:last-child, td:last-child { padding-right: 0; }
td small, th small { display: block; color: var(--muted); font-weight: 400; font-size: 0.86em; }
tbody th { min-width: 9em; }
.hosts tbody th, .flows tbody th { min-width: 13em; }
.sandboxes tbody th { min-width: 3.5em; }
td.mid { min-width: 10.5em; }
td.n { min-width: 4.6em; }
td.w { min-width: 6.4em; }
td.n > span { white-space: nowrap; }
td.mid > span { display: block; }
td time { white-space: nowrap; }
.n { text-align: right; }
tfoot td, tfoot th { font-weight: 650; border-bottom: 0; border-top: 2px solid var(--line); }
details { margin: 0.5rem 0; }
summary { cursor: pointer; color: var(--link); padding: 0.2rem 0; }
.equation { font-variant-numeric: tabular-nums; margin: 0.3rem 0; max-width: none; }
.equation b { white-space: nowrap; }
svg { display: block; overflow: visible; max-width: 100%; }
svg text { font: 12px system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; fill: var(--muted);
  unicode-bidi: isolate; }
svg text.heading { fill: var(--text); font-weight: 600; }
svg text.halo { paint-order: stroke; stroke: var(--ground); stroke-width: 4px; stroke-linejoin: round; }
svg text.narrow { display: none; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .base { stroke: var(--muted); stroke-width: 1; }
svg .sent { fill: var(--sent); }
svg .received { fill: var(--received); }
svg .refused { fill: var(--refused); }
svg .other { fill: var(--other); }
.chart { margin: 0.8rem 0 1rem; max-width: 64rem; overflow: hidden; }
.timeline { display: grid; grid-template-columns: 3.2rem minmax(0, 1fr); }
figcaption { color: var(--muted); font-size: 0.88rem; margin-top: 0.4rem; }
@media screen and (max-width: 44rem) {
  svg text.alternate { display: none; }
  svg text.narrow { display: inline; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: 0.5rem; }
}
"""
STYLE += _narrow("cards", "44rem") + _narrow("wide", "62rem")
STYLE += """@page { size: A4; margin: 14mm 13mm 16mm; }
@media print {
  :root {
    color-scheme: light;
    --ground: #ffffff; --raised: #f4f5f7; --text: #1b1f24; --muted: #57606a; --line: #c9d0d8; --link: #0b57c2;
    --good: #14622f; --good-ground: #e3f4e8; --bad: #a11420; --bad-ground: #fdeaec; --note: #7a4a00;
    --note-ground: #fdf3dc;
    --sent: #1f66b8; --received: #0f7a6c; --refused: #c2333f; --other: #6b5aa8;
  }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  html { font-size: 9.5pt; }
  body { padding: 0; max-width: none; line-height: 1.4; }
  h1 { font-size: 17pt; }
  h2 { font-size: 13pt; }
  table { font-size: 8pt; }
  svg text { font-size: 11px; }
  nav { display: none; }
  svg text.halo { stroke: none; }
  section { margin-top: 1.4rem; }
  h2, h3, caption, summary { break-after: avoid; }
  tr, caption, figure, .box, .figures > div, .equation, dt, dd, li { break-inside: avoid; }
  thead { display: table-header-group; break-inside: avoid; break-after: avoid; }
  tbody tr:first-child { break-before: avoid; }
  tfoot { display: table-row-group; }
  p, li { orphans: 3; widows: 3; }
  a { color: inherit; text-decoration: none; }
}
"""
