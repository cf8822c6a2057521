"""The style of the page: light and dark, a narrow and a wide screen, and paper."""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --soft: #5b6470; --line: #d5dae0; --back: #fff; --card: #f5f7f9; --light: 45%; --warm: #c92a2a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7eb; --soft: #9aa4b0; --line: #3a424c; --back: #15181c; --card: #1e2328; --light: 58%; --warm: #ff8787; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1rem 1.25rem 3rem; }
h1 { font-size: 1.3rem; line-height: 1.35; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .4rem; }
p { margin: .4rem 0; max-width: 64rem; white-space: pre-line; overflow-wrap: anywhere; }
.explanation { border-left: 4px solid hsl(212 60% var(--light)); padding: .2rem 0 .2rem .8rem; font-size: 1.02rem; }
.legend, .note { color: var(--soft); font-size: .87rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .6rem; margin: 1rem 0 .5rem; }
.facts div { background: var(--card); border-radius: 8px; padding: .6rem .8rem; display: flex; flex-direction: column-reverse; justify-content: flex-end; }
.facts dt { color: var(--soft); font-size: .8rem; line-height: 1.3; } .facts dd { margin: 0; font-size: 1.25rem; font-weight: 600; }
.bar { display: grid; grid-template-columns: minmax(0, 15rem) minmax(0, 1fr) 11.5rem; gap: .8rem; align-items: center; margin: .25rem 0; }
.bar .name { overflow-wrap: anywhere; font-size: .87rem; line-height: 1.25; }
.track { position: relative; display: flex; height: 1.25rem; background: var(--card); border-radius: 3px; }
.track i { display: block; height: 100%; } .value { font-variant-numeric: tabular-nums; font-size: .87rem; } small { color: var(--soft); }
.forward { background: hsl(var(--hue) 55% var(--light)); } .backward { background: hsl(var(--hue) 55% var(--light) / .45); } .transfers { background: none; }
i.transfers { background: #8d96a0; }
.track .limit { position: absolute; top: -.2rem; bottom: -.2rem; height: auto; width: 2px; margin-left: -2px; background: var(--warm); }
.m0 { background: #2b6cb0; } .m1 { background: #4c9bd6; } .m2 { background: #93c5ea; } .m3 { background: #d69e2e; } .m4 { background: #8d96a0; }
.key { margin-right: .7rem; white-space: nowrap; } .key i { display: inline-block; width: .75rem; height: .75rem; border-radius: 2px; margin-right: .3rem; }
.chip { display: inline-block; min-width: 1.35rem; padding: 0 .3rem; margin-right: .25rem; border-radius: 4px; text-align: center; font-size: .75rem; line-height: 1.25rem; color: #fff; background: hsl(var(--hue) 55% 38%); }
.tree { list-style: none; padding: 0; margin: .5rem 0; columns: 22rem; column-gap: 2rem; }
.tree li { padding-left: calc(var(--depth) * 1.1rem); break-inside: avoid; font-size: .9rem; overflow-wrap: anywhere; }
.tree li:hover { background: var(--card); } .share { color: var(--soft); margin-left: .6rem; font-variant-numeric: tabular-nums; }
.timeline { width: 100%; } .timeline svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; } svg .soft { fill: var(--soft); } svg .idle { fill: var(--card); }
svg .axis { stroke: var(--soft); stroke-width: .5; } svg .F { fill: hsl(var(--hue) 55% var(--light)); }
svg .B, svg .I { fill: hsl(var(--hue) 55% var(--light) / .45); } svg .W { fill: hsl(var(--hue) 25% var(--light) / .7); }
svg .SEND_F { fill: #8d96a0; } svg .SEND_B { fill: #b7bec6; } svg .REDUCE_GRAD { fill: var(--warm); }
svg .in { text-anchor: middle; pointer-events: none; } svg .inF { fill: #fff; }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .82rem; }
th, td { padding: .3rem .45rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; white-space: pre; }
th { vertical-align: bottom; color: var(--soft); font-weight: 600; white-space: normal; } td.tensors { white-space: normal; overflow-wrap: anywhere; min-width: 9rem; }
code { font-size: .85em; }
#tip { position: fixed; z-index: 9; max-width: min(24rem, 90vw); padding: .35rem .6rem; border-radius: 5px; background: var(--ink); color: var(--back); font-size: .82rem; pointer-events: none; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: .5rem .8rem 2rem; } .bar { grid-template-columns: minmax(0, 1fr) auto; gap: .1rem .6rem; } .bar .track { grid-column: 1 / -1; order: 3; }
}
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --back: #fff; --card: #eee; --light: 45%; } * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 11px; } section { break-inside: avoid-page; } .table { overflow: visible; } table { font-size: 8px; } td, th { padding: .15rem .25rem; white-space: normal; overflow-wrap: anywhere; }
  .bar { grid-template-columns: 9rem minmax(0, 1fr) 9rem; } #tip { display: none; }
}
"""
