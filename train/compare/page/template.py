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
  margin: 0 auto; padding: 2.5rem 1.5rem 5rem; max-width: 72rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
}
h1, h3, .lead, .verdicts li { overflow-wrap: anywhere; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 3rem 0 .6rem; padding-top: .8rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, li { max-width: 46rem; }
a { color: var(--accent); }
.lead, .note { color: var(--soft); }
.note { font-size: .875rem; }
nav { margin: 1rem 0 0; font-size: .875rem; display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; }
.verdicts { list-style: none; margin: 1.6rem 0 1.2rem; padding: 0; display: grid; gap: .6rem; }
.verdicts li {
  max-width: none; padding: .8rem 1rem; background: var(--raised); border-left: 4px solid var(--tone);
  border-radius: 0 6px 6px 0; font-size: 1.08rem;
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
  .numbers.cards td {
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
<nav aria-label="Sections"><a href="#result">Result</a><a href="#curves-h">Learning curves</a>
{% if search %}<a href="#search-h">Learning rates</a>{% endif %}
{% if times %}<a href="#times">Time to accuracy</a>{% endif %}
{% if costs %}<a href="#cost">Speed and memory</a>{% endif %}
{% if calibration %}<a href="#calibration">Calibration</a>{% endif %}
{% for when in signals %}<a href="#signal{{ loop.index }}">Signal {{ when }}</a>{% endfor %}
{% if plans %}<a href="#plan">Conversion</a>{% endif %}
<a href="#settings">Settings</a><a href="#runs">Every run</a><a href="#again">Reproduce</a></nav>
</header>
<main>
{% if not results.complete %}<p class="note"><b>The sweep is not finished</b>: this page shows what there is.</p>{% endif %}
<ul class="verdicts">
{% for v in verdicts %}<li class="{{ v.kind | replace(' ', '-') }}">{{ v.text }}</li>
{% endfor %}</ul>
<section aria-labelledby="result">
<h2 id="result">Result</h2>
<div class="scroll"><table class="numbers cards" aria-describedby="result-note">
<thead><tr>{% for h in headings %}<th scope="col">{{ h }}</th>{% endfor %}</tr></thead>
<tbody>{% for color, row in rows %}<tr>{% for cell in row %}<td data-h="{{ headings[loop.index0] }}">{% if loop.first %}<span class="arm"><span class="dot" style="--c: {{ color }}"></span>{{ cell }}</span>{% else %}{{ cell }}{% endif %}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="note wide" id="result-note">{{ caption }}</p>
<div class="fig half">{{ accuracy.html | safe }}</div>
<noscript>{% if accuracy.png %}<img class="static" src="{{ accuracy.png }}" width="420" alt="Test accuracy of every seed with mean and 95 % interval, by arm and batch size">{% endif %}</noscript>
</section>
<section aria-labelledby="curves-h">
<h2 id="curves-h">Learning curves</h2>
<p class="note">Lines are means over the seeds, bands reach from the lowest to the highest seed.</p>
<div class="fig">{{ curves.html | safe }}</div>
<noscript>{% if curves.png %}<img class="static" src="{{ curves.png }}" width="900" alt="Validation accuracy and training loss over epochs">{% endif %}</noscript>
</section>
{% if search %}
<section aria-labelledby="search-h">
<h2 id="search-h">Learning rates</h2>
<p class="note">Searched with {{ tuned_with }} on the held-out validation split, the same number for every
arm. The large marker (bold in the table) is the one chosen; bars {% if results.tuning_seeds | length == 1 %}are Wilson's 95 % intervals of one model's accuracy on
{{ "{:,}".format(data.val) }} images{% else %}reach from the lowest to the highest seed{% endif %}. The test split had no part in it.</p>
<div class="fig">{{ search.html | safe }}</div>
<div class="scroll"><table><thead><tr><th scope="col">arm</th><th scope="col">batch</th><th scope="col">learning rate: validation accuracy</th></tr></thead>
<tbody>{% for s in searched %}<tr><td>{{ s.arm }}</td><td>{{ s.batch_size }}</td><td>{% for t in s.tried %}{% if t.lr == s.lr %}<b>{% endif %}{{ rate(t.lr) }}: {% if t.accuracies %}{{ "%.2f %%" | format(100 * t.val_accuracy) }}{% if t.diverged %} ({{ t.diverged }} diverged){% endif %}{% else %}diverged{% endif %}{% if t.lr == s.lr %}</b>{% endif %}{{ "" if loop.last else " · " }}{% endfor %}</td></tr>
{% endfor %}</tbody></table></div>
</section>
{% endif %}
{% if times %}
<section aria-labelledby="times">
<h2 id="times">Time to accuracy</h2>
<p class="note">When the reported runs first validated at the target{% if experiment.get("target") is none %}: what the baseline ends with on the
validation split, less {{ "%.2f" | format(100 * experiment.margin) }} points{% endif %}. A run that never did counts as later than all others. Seconds are
training steps alone, at the run's own speed.</p>
{{ numbers(time_headings, times) }}
</section>
{% endif %}
{% if costs %}
<section aria-labelledby="cost">
<h2 id="cost">Speed and memory</h2>
<p class="note">Training steps of every arm, alone in a process of its own, data and optimizer included; after a warm-up, without
evaluation. The first step holds what happens once, compilation too. Memory is what training adds: torch's allocations on a
GPU, resident memory on a CPU.</p>
{{ numbers(cost_headings, costs) }}
</section>
{% endif %}
{% if calibration %}
<section aria-labelledby="calibration">
<h2 id="calibration">Calibration</h2>
{% if reliability %}<p class="note">Accuracy against confidence on the test split, over the samples of all seeds, in 15 bins; bars are Wilson's 95 %
intervals of a bin's samples. Below the dotted line an arm is too sure of itself.</p>
<div class="fig">{{ reliability.html | safe }}</div>{% endif %}
{{ numbers(calibration_headings, calibration) }}
<p class="note wide">Expected calibration error, mean ± 95 % interval over the seeds; its difference to {{ baseline }} is paired by seed.</p>
</section>
{% endif %}
{% for when, signal in signals.items() %}
<section aria-labelledby="signal{{ loop.index }}">
<h2 id="signal{{ loop.index }}">Signal propagation {{ when }}</h2>
{{ signal.panels | safe }}
<noscript><img class="static" src="{{ signal.png }}" width="900" alt="Average channel squared mean, average channel variance and residual variance over the blocks"></noscript>
{% if signal.file %}<p class="note"><a href="{{ signal.file }}">The whole report</a>, with its verdict and every point. Each arm's before and after are with
<a href="#runs">its run</a>.</p>{% endif %}
</section>
{% endfor %}
{% if plans %}
<section aria-labelledby="plan">
<h2 id="plan">Conversion</h2>
{% for arm, plan in plans.items() %}<h3>{{ arm }}</h3>
<div class="scroll"><table><thead><tr>{% for c in plan_columns %}<th scope="col">{{ c }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in plan %}<tr>{% for c in plan_columns %}<td{% if c == "path" %} class="mono"{% endif %}>{{ row[c] }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>{% endfor %}
</section>
{% endif %}
<section aria-labelledby="settings">
<h2 id="settings">Settings</h2>
<p class="note">Where the arms differ. Learning rate, batch size and seed are in the tables.</p>
{{ settings_table(settings[1] | selectattr("differs")) }}
<details><summary>Settings that all arms share</summary>{{ settings_table(settings[1] | rejectattr("differs")) }}</details>
</section>
<section aria-labelledby="runs">
<h2 id="runs">Every run</h2>
<div class="scroll"><table class="numbers"><thead><tr>{% for h in run_headings %}<th scope="col">{{ h }}</th>{% endfor %}<th scope="col">files</th></tr></thead>
<tbody>{% for run, files in runs %}<tr>{% for cell in run %}<td>{{ cell }}</td>{% endfor %}<td>{% for path, word in files %}<a href="{{ path }}">{{ word }}</a>{{ "" if loop.last else ", " }}{% endfor %}</td></tr>
{% endfor %}</tbody></table></div>
</section>
<section aria-labelledby="again">
<h2 id="again">Reproduce</h2>
<pre>{{ command }}</pre>
<div class="pair">
{% for hardware in machines %}<div><h3>Hardware{% if machines | length > 1 %} {{ loop.index }}{% endif %}</h3><dl>{% for key, value in hardware.items() %}<dt>{{ key | replace("_", " ") }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></div>{% endfor %}
<div><h3>Versions</h3><dl>{% for key, value in versions.items() %}<dt>{{ key }}</dt><dd>{{ value }}</dd>{% endfor %}</dl></div>
</div>
<details><summary>The experiment as JSON</summary><pre>{{ raw }}</pre></details>
</section>
</main>
<script>
// Plotly draws with fixed colors: take them from the page, again whenever the scheme changes.
function draw() {
  const css = getComputedStyle(document.documentElement);
  const config = {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["lasso2d", "select2d"]};
  for (const source of document.querySelectorAll("[data-figure]")) {
    const figure = JSON.parse(source.textContent);
    figure.layout.font.color = css.getPropertyValue("--ink").trim();
    figure.layout.hoverlabel = {bgcolor: css.getPropertyValue("--raised").trim()};
    Plotly.react(source.dataset.figure, figure.data, figure.layout, config);
  }
}
{{ then | safe }}(draw);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {{ then | safe }}(draw));
</script>
</body>
</html>
"""
