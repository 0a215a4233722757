"""The style of pages and pictures: colours, light and dark, and sizes, down to a phone's; and a page in it."""

from __future__ import annotations

from collections.abc import Iterable

from deltamerge.apps.report.svg import Markup, element, text

POLICY = "default-src 'none'; style-src 'unsafe-inline'"

STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --card: #fff; --ink: #1c1c1a; --quiet: #63625d; --line: #e2e1dc;
  --one: #2268c0; --two: #d9541e; --on: #fff; --mid: #1c1c1a; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --ink: #f1f0ec; --quiet: #a9a8a1;
  --line: #383733; --one: #62a5f2; --two: #f08a5c; --on: #10151c; --mid: #10151c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem clamp(.7rem, 3vw, 2.5rem) 3rem; max-width: 90rem; background: var(--page);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
h3 { font-size: .95rem; margin: 0 0 .6rem; overflow-wrap: anywhere; }
p { margin: 0 0 .8rem; max-width: 46rem; color: var(--quiet); overflow-wrap: anywhere; }
.conclusion { color: var(--ink); font-size: 1.05rem; margin: .8rem 0; max-width: 52rem; }
.warning { color: var(--two); font-weight: 600; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 19rem), 1fr)); gap: .9rem;
  align-items: start; }
.grid + .grid { margin-top: .9rem; }
.stack { display: grid; gap: .9rem; min-width: 0; }
.wide { grid-template-columns: repeat(auto-fit, minmax(max(40%, min(100%, 27rem)), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1rem; min-width: 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .7rem; margin: 1rem 0; }
.tiles .card { padding: .6rem .8rem; color: var(--quiet); font-size: .85rem; }
.tiles b { display: block; font-size: 1.25rem; font-weight: 600; color: var(--ink); }
.scale { display: flex; align-items: center; gap: .5rem; font-size: 12px; color: var(--quiet); margin-top: .4rem; }
.scale i { flex: 0 1 9rem; height: 9px; border-radius: 3px;
  background: linear-gradient(90deg, color-mix(in srgb, var(--one) 8%, transparent), var(--one)); }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: 13px; color: var(--quiet); margin-bottom: .6rem; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 5px; margin-right: .4rem;
  background: var(--one); }
.key i.second { background: var(--two); }
.key i.best { background: var(--card); border: 2px solid var(--two); }
.key i.dashed { border-radius: 0; width: 16px; height: 0; margin-bottom: .25rem; background: none;
  border-top: 2px dashed var(--quiet); }
svg { display: block; overflow: visible; font-size: 12px; } svg .page { fill: var(--page); }
svg text { fill: var(--ink); } svg .quiet { fill: var(--quiet); font-size: 11px; } svg .on { fill: var(--on); }
svg .mid { fill: var(--mid); } svg .name, svg .value { paint-order: stroke; stroke: var(--card); stroke-width: 4px; }
svg .value, svg .in, svg .mid, svg .on { font-variant-numeric: tabular-nums; }
.bar, .cell { fill: var(--one); } .cell, .none { stroke: var(--card); }
.none, .track { fill: var(--line); fill-opacity: .5; } .axis, svg .rule { stroke: var(--line); }
svg .one { stroke: var(--quiet); stroke-dasharray: 3 3; } .mark { stroke: var(--two); stroke-width: 2.5px; }
.join { stroke: var(--quiet); stroke-opacity: .5; stroke-width: 2px; }
.first { fill: var(--one); } .second { fill: var(--two); } .path { stroke: var(--one); stroke-width: 1.5px; }
.path.second { stroke: var(--two); } .best { fill: none; stroke: var(--two); stroke-width: 2.5px; }
svg .reference { stroke: var(--quiet); stroke-width: 1.5px; stroke-dasharray: 5 4; }
details { margin-top: 1.6rem; } summary { cursor: pointer; font-weight: 600; }
@media (max-width: 420px) { svg .name, svg .value { font-size: 11px; } .card { padding: .8rem .7rem; } }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; margin-top: .6rem; }
td, th { padding: .2rem .8rem .2rem 0; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line);
  font-variant-numeric: tabular-nums; }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left; }
"""


def document(title: str, blocks: Iterable[Markup]) -> str:
    """An HTML page under its title, without scripts; its policy allows only its own style."""
    head = element("title", text(title)), element("style", Markup(STYLE))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"{''.join(head)}</head>\n<body>\n" + "\n".join([element("h1", text(title)), *blocks]) + "\n</body></html>\n"
    )
