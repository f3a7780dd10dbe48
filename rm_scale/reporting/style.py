"""How pages and pictures look: colours for light and dark, the style sheet, and the script that sorts tables."""

from __future__ import annotations

_LIGHT = (
    "--back:#fff;--fore:#1c1e21;--faint:#5c636b;--line:#d9dde2;--card:#f5f6f8;--good:#1a7f37;--bad:#b3261e;"
    "--series-1:#2f6fb5;--series-2:#c4572b;--series-3:#3c8c57;--series-4:#8a5ab5;--series-5:#b08a12;--series-6:#5d7380"
)
_DARK = (
    "--back:#15171a;--fore:#e6e8ea;--faint:#9aa3ad;--line:#353b42;--card:#1f2328;--good:#56d364;--bad:#ff8a80;"
    "--series-1:#6ea8e6;--series-2:#f0936b;--series-3:#74c690;--series-4:#bd95e6;--series-5:#dcb84a;--series-6:#9fb4c0"
)
COLOURS = f":root{{{_LIGHT}}}\n@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}\n"
FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,sans-serif'
CHARTS = """.chart text{font-size:11px;fill:currentColor}
.chart .faint{fill:var(--faint)}.chart .grid{stroke:var(--line);stroke-width:1}
.chart .ref{stroke:currentColor;stroke-width:1.5;stroke-dasharray:4 3}
"""

PAGE = (
    COLOURS
    + """*{box-sizing:border-box}
body{margin:0 auto;padding:1.2rem;max-width:74rem;background:var(--back);color:var(--fore);
font:16px/1.5 """
    + FONT
    + """}
h1{font-size:1.6rem;margin:.2rem 0 .6rem}h2{font-size:1.2rem;margin:2rem 0 .6rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.2rem 0 .4rem}p{margin:.4rem 0;max-width:56rem}code{font-size:.9em;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));gap:.6rem;margin:1rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.5rem;padding:.6rem .8rem}
.tile b{display:block;font-size:1.45rem;line-height:1.25;font-variant-numeric:tabular-nums}
.tile span,.faint,figcaption,.nothing{color:var(--faint);font-size:.87rem}
.warnings{border-left:.25rem solid var(--bad);background:var(--card);padding:.5rem .8rem .5rem 1.6rem;max-width:56rem;
overflow-wrap:anywhere}.warnings b{color:var(--bad)}
.wide{overflow-x:auto;background:linear-gradient(to right,var(--back) 40%,transparent) 0 0/2.5rem 100%,
linear-gradient(to left,var(--back) 40%,transparent) 100% 0/2.5rem 100%,
radial-gradient(farthest-side at 0 50%,var(--faint),transparent) 0 0/.7rem 100%,
radial-gradient(farthest-side at 100% 50%,var(--faint),transparent) 100% 0/.7rem 100%;background-repeat:no-repeat;
background-attachment:local,local,scroll,scroll}table{border-collapse:collapse;width:100%;font-size:.92rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .6rem;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:10rem}pre{white-space:pre-wrap;
overflow-wrap:anywhere;background:var(--card);border-radius:.5rem;padding:.6rem .8rem}
figure{margin:1rem 0}.chart{width:100%;height:auto;display:block}
"""
    + CHARTS
    + """.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:0 1.4rem}
.answer{display:grid;gap:0 1.4rem}.answer table{font-size:.84rem;margin:1rem 0}.answer .wide{min-width:0}
.answer th,.answer td{padding:.22rem .4rem}.answer td:first-child{white-space:nowrap;min-width:0}
@media (min-width:60rem){.answer{grid-template-columns:minmax(0,5fr) minmax(0,6fr)}}
.kind{border:1px solid var(--line);border-radius:.3rem;padding:0 .35rem;font-size:.75rem;color:var(--faint);
vertical-align:middle;white-space:nowrap}
.kind.predicted{border-style:dashed}.good{color:var(--good)}.bad{color:var(--bad)}
details{margin:.6rem 0}summary{cursor:pointer}
th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--series-1)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
.filter{margin:.4rem 0;color:var(--faint);font-size:.87rem}
.filter input{font:inherit;color:inherit;padding:.2rem .4rem;min-width:16rem;max-width:100%;
background:var(--back);border:1px solid var(--line);border-radius:.3rem;margin-right:.6rem}
@media (max-width:40rem){.chart text{font-size:13px}}
@media print{body{max-width:none}details{display:block}}
"""
)

SORTING = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], rows = [...body.rows], heads = [...table.tHead.rows[0].cells];
  const key = (row, column) => {
    const shown = row.cells[column].textContent.trim(), plain = shown.replace(/,/g, "");
    if (shown === "–") return null;
    return /^[-+]?[.\\d]+(e[-+]?\\d+)?($|[ %])/.test(plain) ? parseFloat(plain) : shown.toLowerCase();
  };
  const order = (a, b, sign) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1;
    return sign * (typeof a === "number" ? a - b : a.localeCompare(b));
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      // The first click shows the largest figures on top, and names from A to Z.
      const before = head.getAttribute("aria-sort"), up = before ? before === "descending" : column === 0;
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      body.append(...[...rows].sort((a, b) => order(key(a, column), key(b, column), up ? 1 : -1)));
    });
  });
  const field = document.createElement("input"), count = document.createElement("span");
  const line = document.createElement("p");
  field.type = "search";
  field.placeholder = "filter: words that a row must hold";
  field.setAttribute("aria-label", "Filter the rows of this table");
  field.addEventListener("input", () => {
    const words = field.value.toLowerCase().split(/\\s+/).filter(Boolean);
    for (const row of rows) row.hidden = !words.every(word => row.textContent.toLowerCase().includes(word));
    count.textContent = words.length ? `${rows.filter(row => !row.hidden).length} of ${rows.length} rows` : "";
  });
  line.className = "filter";
  line.append(field, count);
  table.parentElement.before(line);
}
"""
"""Makes the tables of class `sortable` sort by a click on a header, and filter by the words of a text field. Without
it they are plain tables."""
