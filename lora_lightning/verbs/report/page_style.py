"""The style sheet of the page: light and dark, from 320 pixels up, also on paper."""

from __future__ import annotations

from lora_lightning.verbs.report.style import colour_rules

_LIGHT = (
    "--ink:#1f2429;--muted:#5d6770;--line:#e1e5e9;--paper:#ffffff;--card:#f6f8fa;--mark:#0072b2;"
    "--good:#00694d;--bad:#a34600;"
)
_DARK = (
    "--ink:#e8eaed;--muted:#a2abb4;--line:#2c333a;--paper:#14181c;--card:#1b2127;--mark:#5db1e6;"
    "--good:#3fcf9f;--bad:#ff9a52;"
)
_RULES = """
*,*::before,*::after{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,-apple-system,
"Segoe UI",Roboto,"Helvetica Neue","Liberation Sans",Arial,sans-serif;overflow-wrap:anywhere}
main{max-width:1120px;margin:0 auto;padding:2.5rem 1.5rem 4rem}
header{margin-bottom:2rem}
h1{font-size:clamp(1.6rem,4vw,2.3rem);line-height:1.15;margin:.2rem 0 .5rem;letter-spacing:-.015em}
h2{font-size:clamp(1.2rem,2.6vw,1.55rem);line-height:1.25;margin:.15rem 0 .9rem;
max-width:62rem;letter-spacing:-.01em;text-wrap:pretty}
h3{font-size:1.05rem;margin:2rem 0 .6rem}
p{margin:.5rem 0;max-width:44rem}
.kind{color:var(--muted);font-size:.86rem;font-weight:600;margin:0}
.about,.note,figcaption,footer{color:var(--muted);font-size:.92rem}
section{border-top:1px solid var(--line);padding-top:1.6rem;margin-top:2.4rem}
section section{margin-top:1.8rem}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,9.5rem),1fr));gap:.75rem;
margin:1.6rem 0 0;padding:0}
.tiles div{background:var(--card);border-radius:.6rem;padding:.8rem 1rem}
.tiles dt{color:var(--muted);font-size:.84rem}
.tiles dd{margin:0}
.tiles dd b{display:block;font-size:1.55rem;line-height:1.25;font-weight:650;
font-variant-numeric:tabular-nums;letter-spacing:-.01em}
.tiles dd span{color:var(--muted);font-size:.84rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,25rem),1fr));
gap:1.8rem 2.2rem;align-items:start}
.figures.narrow{max-width:36rem}
figure{margin:0;min-width:0}
figure svg{display:block;width:100%;height:auto;overflow:visible}
figure svg *{stroke-linejoin:round;stroke-linecap:butt}
figure svg text{font-family:inherit!important}
figcaption{margin-bottom:.5rem;color:var(--ink);font-weight:550;font-size:.95rem}
table{border-collapse:collapse;width:100%;max-width:48rem;font-size:.94rem;
font-variant-numeric:tabular-nums}
table.wide{max-width:none}
th,td{text-align:left;vertical-align:top;padding:.42rem .9rem .42rem 0;
border-bottom:1px solid var(--line)}
thead th{color:var(--muted);font-weight:600;font-size:.86rem;border-bottom-width:2px}
tbody th{font-weight:500}
.n{text-align:right}
td.n:last-child,th.n:last-child{padding-right:.2rem}
.good{color:var(--good)}.bad{color:var(--bad)}
.sample{background:var(--card);border-radius:.6rem;padding:.4rem 1rem .8rem;margin:0 0 1rem}
.sample dt{color:var(--muted);font-size:.84rem;margin-top:.6rem}
.sample dd{margin:.1rem 0 0}
pre{margin:0;white-space:pre-wrap;overflow-wrap:anywhere;
font:.9rem/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
.tuned pre{border-left:3px solid var(--mark);padding-left:.7rem}
.none{color:var(--muted);font-style:italic}
details{margin:1rem 0}
summary{cursor:pointer;color:var(--mark);font-size:.95rem;padding:.3rem 0}
summary:focus-visible{outline:2px solid var(--mark);outline-offset:3px}
code{font:.9em ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace}
footer{border-top:1px solid var(--line);margin-top:3rem;padding-top:1rem}
@media (max-width:640px){
main{padding:1.4rem 1rem 3rem}
.tiles{grid-template-columns:1fr 1fr}
table.stack thead{display:none}
table.stack,table.stack tbody,table.stack tr,table.stack td,table.stack th{display:block;width:auto}
table.stack tr{border-bottom:1px solid var(--line);padding:.5rem 0}
table.stack th,table.stack td{border:0;padding:.1rem 0}
table.stack td{display:flex;justify-content:space-between;gap:1rem;text-align:right}
table.stack td::before{content:attr(data-of);color:var(--muted);text-align:left}
}
@media print{main{max-width:none;padding:0}section{break-inside:avoid}}
"""


def style_sheet() -> str:
    """All rules; a page without other files."""
    light, dark = colour_rules()
    return (
        f":root{{color-scheme:light dark;{_LIGHT}{light}}}"
        f"@media (prefers-color-scheme:dark){{:root{{{_DARK}{dark}}}}}{_RULES}"
    )
