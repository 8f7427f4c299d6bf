"""The page. Values are escaped by jinja2; nothing is loaded from elsewhere and no script runs."""

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ report.title }}</title>
<style>
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 66rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.7rem; line-height: 1.25; margin-bottom: 1rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin-top: 2.5rem; border-bottom: 1px solid #ccc; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; text-align: right; vertical-align: top; }
th { border-bottom: 1px solid #888; font-weight: 600; }
tr:first-child th:first-child, td:first-child { text-align: left; }
td.start, th.start { border-left: 1px solid #ddd; }
tbody tr { border-bottom: 1px solid #e5e5e5; }
tbody tr.mean { border-top: 2px solid #888; }
dl.facts { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1.2rem; }
dl.facts dt { color: #555; }
dl.facts dd { margin: 0; overflow-wrap: anywhere; }
small, .how { color: #444; }
td small { display: block; white-space: nowrap; }
.how { max-width: 48rem; }
.scroll { overflow-x: auto; }
figure { margin: 1rem 0; }
figure img { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: .85rem; line-height: 1.35; }
@media print { body { font-size: 10pt; max-width: none; margin: 0; }
  table { font-size: 8pt; } th, td { padding: .15rem .3rem; }
  figure, tr { break-inside: avoid; } h2 { break-after: avoid; }
  pre { white-space: pre-wrap; overflow-wrap: anywhere; } }
</style>
</head>
<body>
<h1>{{ report.title }}</h1>
{% if report.facts %}
<dl class="facts">
{% for label, value in report.facts.items() %}<dt>{{ label }}</dt><dd>{{ value }}</dd>
{% endfor %}</dl>
{% endif %}
{% if report.notes %}
<ul class="notes">
{% for note in report.notes %}<li>{{ note }}</li>
{% endfor %}</ul>
{% endif %}

{% if table.rows %}
<h2 id="scores">Scores on held-out rows</h2>
<div class="scroll"><table>
<thead>
<tr><th scope="col" rowspan="2">task</th><th scope="col" rowspan="2">rows</th>
{% for model in table.models %}<th scope="colgroup" colspan="2" class="start">{{ model }}</th>
{% endfor %}{% if table.pairs %}<th scope="colgroup" colspan="{{ table.pairs | length }}"
 class="start">difference of accuracy, points</th>{% endif %}</tr>
<tr>{% for model in table.models %}<th scope="col" class="start">acc., %</th>
<th scope="col">loss</th>
{% endfor %}{% for first, second in table.pairs %}<th scope="col" class="start">{{ first }} −
 {{ second }}</th>
{% endfor %}</tr>
</thead>
<tbody>
{% for row in table.rows %}<tr{% if row.task == mean %} class="mean"{% endif %}>
<td>{{ row.task }}</td><td>{{ row.rows }}</td>
{% for accuracy in row.accuracies %}<td class="start">{{ accuracy }}</td>
<td>{{ row.losses[loop.index0] }}</td>
{% endfor %}{% for found in row.differences %}<td class="start">{% if found is none %}–{% else %}
{{ found }}<small>{{ found.interval }}</small>{% endif %}</td>
{% endfor %}</tr>
{% endfor %}</tbody>
</table></div>
<p class="how">Accuracy is the share of right answers; loss is the mean negative log-likelihood of
the right answer per token, in nats (lower is better).{% if table.pairs %} In brackets: the 95 %
interval of a difference, which treats the rows as a sample of the task and the models as
independent (Newcombe). The mark {{ unclear }} means that the interval includes 0: from so few rows
one cannot tell which model is better. The intervals know nothing of another seed or learning
rate.{% endif %}</p>
{% endif %}

{% for figure in figures %}
<h2 id="{{ figure.name }}">{{ figure.title }}</h2>
<figure><img src="data:image/png;base64,{{ figure.base64 }}" alt="{{ figure.alt }}"></figure>
{% for paragraph in figure.how %}<p class="how">{{ paragraph }}</p>
{% endfor %}
{% if figure.name == "utilisation" %}
<div class="scroll"><table>
<thead><tr><th scope="col">task</th><th scope="col">routed sites</th>
<th scope="col">experts at them</th><th scope="col">without any token</th>
<th scope="col">greatest load ÷ uniform</th><th scope="col">where</th></tr></thead>
<tbody>
{% for row in usage %}<tr><td>{{ row.task }}</td><td>{{ row.sites }}</td><td>{{ row.experts }}</td>
<td>{{ row.unused }}</td><td>{{ row.greatest }}</td><td>{{ row.where }}</td></tr>
{% endfor %}</tbody>
</table></div>
{% endif %}
{% endfor %}

{% if report.configuration %}
<h2 id="configuration">Configuration</h2>
<pre>{{ report.configuration }}</pre>
{% endif %}
</body>
</html>
"""
