"""The comparison page's template (jinja2, autoescaped)."""
# ruff: noqa: E501

from __future__ import annotations

TEMPLATE = """{% macro settings_table(lines) %}
<div class="scroll"><table class="settings"><thead><tr><th scope="col">setting</th>{% for name in settings[0] %}<th scope="col">{{ name }}</th>{% endfor %}</tr></thead>
<tbody>{% for line in lines %}<tr><td class="mono">{{ line.key }}</td>{% for value in line.values %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}{% macro numbers(headings, lines) %}
<div class="scroll"><table class="numbers cards"><thead><tr>{% for h in headings %}<th scope="col">{{ h }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in lines %}<tr>{% for cell in row %}<td data-h="{{ headings[loop.index0] }}">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% endmacro %}{% macro fold(name, title) %}
<details class="fold"><summary><h2>{{ title }}</h2></summary>
<section id="{{ name }}" aria-label="{{ title }}">
{{ caller() }}</section>
</details>
{% endmacro %}<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<link rel="icon" href="data:,">
<style>
:root {
  --ink: #1b1f24; --soft: #59636e; --line: #d8dee4; --paper: #ffffff; --raised: #f5f7f9; --accent: #2b5d8a;
  --good: #1a7f37; --bad: #c0362c; --open: #8a6100;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e9ed; --soft: #9aa4b0; --line: #333b45; --paper: #14171b; --raised: #1c2026; --accent: #7fb2e0;
    --good: #56c271; --bad: #f0857b; --open: #e0b64c;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1.5rem 1.5rem 4rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1, h3, .lead, .verdicts li { overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .2rem; letter-spacing: -.01em; }
.lead { margin: 0; }
h2 { display: inline; font-size: 1.1rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 46rem; }
a { color: var(--accent); }
.lead, .note { color: var(--soft); }
.note { font-size: .875rem; }
.verdicts { list-style: none; margin: 1rem 0 .8rem; padding: 0; display: grid; gap: .4rem .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 28rem), 1fr)); }
.verdicts li {
  max-width: none; padding: .55rem 1rem; background: var(--raised); border-left: 4px solid var(--tone);
  border-radius: 0 6px 6px 0; font-size: 1.05rem;
}
.above, .not-below { --tone: var(--good); } .below { --tone: var(--bad); } .inconclusive, .no-comparison { --tone: var(--open); }
.scroll { overflow-x: auto; position: relative; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; min-width: 100%; }
.note.wide { max-width: none; margin-top: .6rem; }
th, td { padding: .38rem .9rem .38rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); white-space: nowrap; }
.numbers td:not(:first-child), .numbers th:not(:first-child) { text-align: right; white-space: nowrap; }
.numbers td:last-child, .numbers th:last-child { padding-right: 0; }
td:first-child, .settings td, .settings th { min-width: 7rem; max-width: 24rem; white-space: normal; overflow-wrap: anywhere; }
.arm { line-break: anywhere; }
/* A phone has no room for columns: a row is a list of its values, each with its heading. */
@media (max-width: 44rem) {
  body { padding: 1.5rem 1rem 3rem; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .cards, .cards tbody, .cards tr { display: block; }
  .cards tr { padding: .5rem 0; border-bottom: 1px solid var(--line); }
  .cards td, .numbers.cards td {
    display: flex; justify-content: space-between; gap: 1.2rem; max-width: none; padding: .1rem 0; border: 0;
    white-space: normal; text-align: right;
  }
  .cards td::before { content: attr(data-h); flex: none; color: var(--soft); }
  .cards td:first-child { font-weight: 600; }
}
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; background: var(--c); }
.mono, code, pre { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; font-size: .85em; }
pre { background: var(--raised); padding: .9rem 1rem; border-radius: 6px; white-space: pre-wrap; overflow-wrap: anywhere; }
.static { background: #fff; border-radius: 6px; padding: .5rem; max-width: 100%; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--accent); }
.fold { margin: 0; border-top: 1px solid var(--line); } .fold:last-of-type { border-bottom: 1px solid var(--line); }
.fold > summary { padding: .7rem 0; color: var(--ink); } .fold > summary::marker { color: var(--soft); }
.fold > summary:hover h2 { color: var(--accent); } .fold > section { padding: 0 0 1.6rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1.2rem; font-size: .9rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
.half { max-width: 46rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem; }
</style>
<script>{{ plotlyjs | safe }}</script>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="lead">{{ model }}, {{ "{:,}".format(data.train) }} training images of
{{ data.size }} × {{ data.size }}, {{ experiment.seeds | length }} paired seeds.</p>
</header>
<main>
{% if not results.complete %}<p class="note"><b>The sweep is not finished</b>: this page shows what there is.</p>{% endif %}
<ul class="verdicts">
{% for v in verdicts %}<li class="{{ v.kind | replace(' ', '-') }}">{{ v.text }}</li>
{% endfor %}</ul>
<section id="result" aria-label="Result">
<div class="scroll"><table class="numbers cards" aria-describedby="result-note">
<thead><tr>{% for h in headings %}<th scope="col">{{ h }}</th>{% endfor %}</tr></thead>
<tbody>{% for color, row in rows %}<tr>{% for cell in row %}<td data-h="{{ headings[loop.index0] }}">{% if loop.first %}<span class="arm"><span class="dot" style="--c: {{ color }}"></span>{{ cell }}</span>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="note wide" id="result-note">{{ caption }}</p>
</section>
<section aria-label="Learning curves">
<div class="fig">{{ curves.html | safe }}</div>
<noscript>{% if curves.png %}<img class="static" src="{{ curves.png }}" width="900" alt="Validation accuracy and training loss over epochs">{% endif %}</noscript>
<p class="note wide">Lines are means over the seeds, bands reach from the lowest to the highest seed.</p>
</section>
{% call fold("seeds", "Every seed") %}
<div class="fig half">{{ accuracy.html | safe }}</div>
<noscript>{% if accuracy.png %}<img class="static" src="{{ accuracy.png }}" width="420" alt="Test accuracy of every seed with mean and 95 % interval, by arm and batch size">{% endif %}</noscript>
{% endcall %}
{% if search %}
{% call fold("rates", "Learning rates") %}
<p class="note">Searched with {{ tuned_with }} on the held-out validation split, the same number for every
arm. The large marker (bold in the table) is the one chosen; bars {% if results.tuning_seeds | length == 1 %}are Wilson's 95 % intervals of one model's accuracy on
{{ "{:,}".format(data.val) }} images{% else %}reach from the lowest to the highest seed{% endif %}. The test split had no part in it.</p>
<div class="fig">{{ search.html | safe }}</div>
<div class="scroll"><table class="cards"><thead><tr><th scope="col">arm</th><th scope="col">batch</th><th scope="col">learning rate: validation accuracy</th></tr></thead>
<tbody>{% for s in searched %}<tr><td data-h="arm">{{ s.arm }}</td><td data-h="batch">{{ s.batch_size }}</td><td data-h="lr: validation"><span>{% for t in s.tried %}{% if t.lr == s.lr %}<b>{% endif %}{{ rate(t.lr) }}: {% if t.accuracies %}{{ "%.2f %%" | format(100 * t.val_accuracy) }}{% if t.diverged %} ({{ t.diverged }} diverged){% endif %}{% else %}diverged{% endif %}{% if t.lr == s.lr %}</b>{% endif %}{{ "" if loop.last else " · " }}{% endfor %}</span></td></tr>
{% endfor %}</tbody></table></div>
{% endcall %}
{% endif %}
{% if times %}
{% call fold("times", "Time to accuracy") %}
<p class="note">When the reported runs first validated at the target{% if experiment.get("target") is none %}: what the baseline ends with on the
validation split, less {{ "%.2f" | format(100 * experiment.margin) }} points{% endif %}. A run that never did counts as later than all others. Seconds are
training steps alone, at the run's own speed.</p>
{{ numbers(time_headings, times) }}
{% endcall %}
{% endif %}
{% if costs %}
{% call fold("cost", "Speed and memory") %}
<p class="note">Training steps of every arm, alone in a process of its own, data and optimizer included; after a warm-up, without
evaluation. The first step holds what happens once, compilation too. Memory is what training adds: torch's allocations on a
GPU, resident memory on a CPU.</p>
{{ numbers(cost_headings, costs) }}
{% endcall %}
{% endif %}
{% if calibration %}
{% call fold("calibration", "Calibration") %}
{% if reliability %}<p class="note">Accuracy against confidence on the test split, over the samples of all seeds, in 15 bins; bars are Wilson's 95 %
intervals of a bin's samples. Below the dotted line an arm is too sure of itself.</p>
<div class="fig">{{ reliability.html | safe }}</div>{% endif %}
{{ numbers(calibration_headings, calibration) }}
<p class="note wide">Expected calibration error, mean ± 95 % interval over the seeds; its difference to {{ baseline }} is paired by seed.</p>
{% endcall %}
{% endif %}
{% for when, signal in signals.items() %}
{% call fold("signal" ~ loop.index, "Signal propagation " ~ when) %}
{{ signal.panels | safe }}
<noscript><img class="static" src="{{ signal.png }}" width="900" alt="Average channel squared mean, average channel variance and residual variance over the blocks"></noscript>
{% if signal.file %}<p class="note"><a href="{{ signal.file }}">The whole report</a>, with its verdict and every point. Each arm's before and after are with
<a href="#runs">its run</a>.</p>{% endif %}
{% endcall %}
{% endfor %}
{% if plans %}
{% call fold("plan", "Conversion") %}
{% for arm, plan in plans.items() %}<h3>{{ arm }}</h3>
<div class="scroll"><table><thead><tr>{% for c in plan_columns %}<th scope="col">{{ c }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in plan %}<tr>{% for c in plan_columns %}<td{% if c == "path" %} class="mono"{% endif %}>{{ row[c] }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endfor %}
{% endcall %}
{% endif %}
{% call fold("settings", "Settings") %}
<p class="note">Where the arms differ. Learning rate, batch size and seed are in the tables.</p>
{{ settings_table(settings[1] | selectattr("differs")) }}
<details><summary>Settings that all arms share</summary>{{ settings_table(settings[1] | rejectattr("differs")) }}</details>
{% endcall %}
{% call fold("runs", "Every run") %}
<div class="scroll"><table class="numbers"><thead><tr>{% for h in run_headings %}<th scope="col">{{ h }}</th>{% endfor %}<th scope="col">files</th></tr></thead>
<tbody>{% for run, files in runs %}<tr>{% for cell in run %}<td>{{ cell }}</td>{% endfor %}<td>{% for path, word in files %}<a href="{{ path }}">{{ word }}</a>{{ "" if loop.last else ", " }}{% endfor %}</td></tr>
{% endfor %}</tbody></table></div>
{% endcall %}
{% call fold("again", "Reproduce") %}
<pre>{{ command }}</pre>
<div class="pair">
{% for hardware in machines %}<div><h3>Hardware{% if machines | length > 1 %} {{ loop.index }}{% endif %}</h3><dl>{% for key, value in hardware.items() %}<dt>{{ key | replace("_", " ") }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></div>{% endfor %}
<div><h3>Versions</h3><dl>{% for key, value in versions.items() %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></div>
</div>
<details><summary>The experiment as JSON</summary><pre>{{ raw }}</pre></details>
{% endcall %}
</main>
<script>
// Plotly draws with fixed colors: take them from the page, again whenever the scheme changes.
function draw() {
  const css = getComputedStyle(document.documentElement);
  const config = {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"]};
  for (const source of document.querySelectorAll("[data-figure]")) {
    if (!document.getElementById(source.dataset.figure).offsetParent) continue;  // folded: it has no size yet
    const figure = JSON.parse(source.textContent);
    figure.layout.font.color = css.getPropertyValue("--ink").trim();
    figure.layout.hoverlabel = {bgcolor: css.getPropertyValue("--raised").trim()};
    Plotly.react(source.dataset.figure, figure.data, figure.layout, config);
  }
}
{{ then | safe }}(draw);
// What was folded is drawn when it opens; signal panels, which draw themselves, get their width.
for (const fold of document.querySelectorAll(".fold"))
  fold.addEventListener("toggle", () => fold.open && {{ then | safe }}(() => {
    draw();
    for (const plot of fold.querySelectorAll(".nfnets-signal .js-plotly-plot")) Plotly.Plots.resize(plot);
  }));
addEventListener("beforeprint", () => document.querySelectorAll(".fold").forEach((fold) => { fold.open = true; }));
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {{ then | safe }}(draw));
</script>
</body>
</html>
"""
