"""Style and script of the HTML report."""

from __future__ import annotations

PANELS_CSS = """
.nfnets-signal{--fg:#1d2329;--muted:#5b6570;--grid:#e3e7eb;color:var(--fg);font:14px/1.45 system-ui,sans-serif}
@media (prefers-color-scheme:dark){.nfnets-signal{--fg:#e6e9ec;--muted:#9aa5b1;--grid:#30373f}}
.nfnets-signal .controls{display:flex;flex-wrap:wrap;gap:.4rem 1.2rem;align-items:center;margin:.3rem 0 .6rem}
.nfnets-signal label{display:inline-flex;gap:.4rem;align-items:center;cursor:pointer}
.nfnets-signal label i{width:1.4rem;height:3px;background:var(--c);border-radius:2px}
.nfnets-signal .controls span{display:inline-flex;gap:.4rem;align-items:center;color:var(--muted)}
.nfnets-signal .controls b{width:1.6rem;border-top:2px dashed var(--muted)}
.nfnets-signal .controls b.dot{border-top-style:dotted}
.nfnets-signal .controls b.cause{width:0;height:1.1em;border:0;border-left:2px solid #d0342c}
.nfnets-signal .controls b.end{width:auto;border:0;color:#d0342c}
.nfnets-signal .controls b.end::before{content:"✕"}
.nfnets-signal .time input{width:min(22rem,50vw)}
.nfnets-signal .plot{outline-offset:2px}
.nfnets-signal .plot:focus-visible{outline:2px solid #0072B2}
"""

# One function for every panel group on a page; theme colors come from the style sheet, so dark and light agree.
PANELS_JS = """
window.nfnetsSignal = window.nfnetsSignal || function (id) {
  const root = document.getElementById(id);
  if (!window.Plotly) {
    root.querySelector('.plots').textContent =
      'The panels need the file plotly.js that was written with this page, where it was. The table reads without it.';
    return;
  }
  const data = JSON.parse(document.getElementById(id + '-data').textContent);
  const plots = root.querySelector('.plots');
  const slider = root.querySelector('input[type=range]');
  const boxes = [...root.querySelectorAll('input[type=checkbox]')];
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  function themed(layout) {
    const out = JSON.parse(JSON.stringify(layout));
    out.font = {color: color('--fg'), family: 'system-ui, sans-serif', size: 12};
    out.modebar = {bgcolor: 'rgba(0,0,0,0)', color: color('--muted'), activecolor: color('--fg')};
    out.hoverlabel = {align: 'left', font: {family: 'system-ui, sans-serif', size: 12}};
    for (const key of Object.keys(out)) if (/^[xy]axis/.test(key)) {
      out[key].gridcolor = color('--grid');
      out[key].linecolor = color('--muted');
    }
    return out;
  }
  function shown(trace) {
    const box = boxes.find((b) => b.value === trace.legendgroup);
    const text = trace.text && trace.text.map((i) => data.texts[i]);
    return Object.assign({}, trace, {visible: !box || box.checked, text});
  }
  function walk(plot, event) {
    const by = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!by) return;
    event.preventDefault();
    const series = plot.data.findIndex((t) => t.meta && t.meta.measured && t.visible);
    if (series < 0) return;
    const xs = plot.data[series].x;
    plot.at = plot.at === undefined ? (by > 0 ? 0 : xs.length - 1) : (plot.at + by + xs.length) % xs.length;
    Plotly.Fx.hover(plot, [{curveNumber: series, pointNumber: plot.at}]);
  }
  function draw() {
    const at = slider ? Number(slider.value) : 0;
    data.figures[at].forEach((figure, i) => {
      let plot = plots.children[i];
      if (!plot) {
        plot = document.createElement('div');
        plot.className = 'plot';
        plot.tabIndex = 0;
        plot.setAttribute('role', 'img');
        plot.setAttribute('aria-label', 'panels over depth; arrow keys walk along the layers');
        plot.addEventListener('keydown', (event) => walk(plot, event));
        plots.appendChild(plot);
      }
      Plotly.react(plot, figure.data.map(shown), themed(figure.layout), {responsive: true, displaylogo: false});
    });
    if (slider) root.querySelector('output').value = data.steps[at];
  }
  boxes.forEach((box) => box.addEventListener('change', draw));
  if (slider) slider.addEventListener('input', draw);
  window.matchMedia('(prefers-color-scheme: dark)').addEventListener('change', draw);
  draw();
};
"""

PAGE_CSS = """
:root{--bg:#fff;--fg:#1d2329;--muted:#5b6570;--rule:#dde2e7;--soft:#f5f7f9;--ok:#1a7f4b;--bad:#b3261e;--badbg:#fdecea}
@media (prefers-color-scheme:dark){:root{--bg:#14181c;--fg:#e6e9ec;--muted:#9aa5b1;--rule:#30373f;--soft:#1c2228;
--ok:#5fd39a;--bad:#ff8a80;--badbg:#3a1f1d}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 1.2rem}
header{padding-top:1.6rem}
h1{margin:0;font-size:1.6rem}
header p,.notes{color:var(--muted);margin:.2rem 0 1rem}
.notes{margin-top:.8rem;font-size:13px}
.notes{padding-left:1.1rem}
h2{font-size:1.15rem;margin:1.8rem 0 .6rem;border-bottom:1px solid var(--rule);padding-bottom:.3rem}
.verdicts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(24rem,100%),1fr));gap:.8rem;align-items:start}
.verdict{border:1px solid var(--rule);border-left:4px solid var(--ok);border-radius:6px;padding:.6rem .9rem;
background:var(--soft);overflow-wrap:anywhere}
.verdict.bad{border-left-color:var(--bad)}
.verdict h3{margin:0;font-size:1rem;color:var(--ok)}
.verdict.bad h3{color:var(--bad)}
.verdict p,.verdict ul{margin:.2rem 0 0}
.verdict ul{padding-left:1.1rem}
.verdict summary,.idle summary{cursor:pointer;color:var(--muted)}
.verdict code{font-size:.95em}
.idle{margin:.7rem 0;font-size:13px;color:var(--muted)}
.idle ul{margin:.2rem 0;padding-left:1.1rem}
.scroll{overflow:auto;max-height:80vh;border:1px solid var(--rule);border-radius:6px}
table.points{border-collapse:separate;border-spacing:0;font-size:13px;font-variant-numeric:tabular-nums;min-width:100%}
.points th,.points td{padding:.2rem .6rem;white-space:nowrap;border-bottom:1px solid var(--rule);text-align:right;
font-weight:400}
.points .t{text-align:left}
.points thead th{position:sticky;top:0;background:var(--soft);z-index:1;padding:0}
.points thead button{all:unset;cursor:pointer;padding:.4rem .6rem;font-weight:600;box-sizing:border-box;width:100%}
.points thead button:focus-visible{outline:2px solid var(--fg);outline-offset:-2px}
.points thead th[aria-sort=ascending] button::after{content:" ▲"}
.points thead th[aria-sort=descending] button::after{content:" ▼"}
.points tr.join th,.points tr.join td{font-weight:600}
.points tr.broken th,.points tr.broken td{background:var(--badbg)}
.points em{font-style:normal;font-weight:600;font-size:11px;color:var(--bad);border:1px solid;border-radius:4px;
padding:0 .3rem}
"""

TABLE_JS = """
for (const table of document.querySelectorAll('table.points')) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => { const c = row.cells[i]; return c.dataset.v !== undefined ? c.dataset.v : c.textContent; };
  heads.forEach((head, i) => head.firstElementChild.addEventListener('click', () => {
    const was = head.getAttribute('aria-sort');
    const now = was === null ? 'ascending' : was === 'ascending' ? 'descending' : null;
    heads.forEach((h) => h.removeAttribute('aria-sort'));
    let rows = original;
    if (now) {
      head.setAttribute('aria-sort', now);
      const sign = now === 'ascending' ? 1 : -1;
      const numeric = head.classList.contains('n');
      rows = [...original].sort((a, b) => {
        const [x, y] = [value(a, i), value(b, i)];
        if (x === '' || y === '') return (x === '') - (y === '');  // what was not measured stays last
        const [p, q] = [Number(x.replace('inf', 'Infinity')), Number(y.replace('inf', 'Infinity'))];
        if (!numeric) return sign * x.localeCompare(y, 'en', {numeric: true});
        if (Number.isNaN(p) || Number.isNaN(q)) return Number.isNaN(p) - Number.isNaN(q);
        return sign * (p - q);
      });
    }
    body.append(...rows);
  }));
}
"""
