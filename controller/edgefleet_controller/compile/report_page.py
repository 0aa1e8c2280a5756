"""Stage 2, compile: the report's page. Pure: receives the report as JSON holds it and pictures, hands on one self-contained HTML file.

Plots are inline SVG, pictures inline PNG; no script, no font, no address.
"""

from __future__ import annotations

import base64
import io
import math
from html import escape
from typing import Any

from PIL import Image

from edgefleet_controller.compile.port import share_title
from edgefleet_controller.compile.quality import EXACT_DB

MOST_PICTURES = 24
MOST_LAYERS = 40
THUMBNAIL = 112  # pixels
WIDTH, HEIGHT, LEFT, BOTTOM = 640, 300, 60, 40
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1c2430;margin:2em auto;max-width:60em;padding:0 1em}
h1{font-size:1.5em;margin:0 0 .2em}h2{font-size:1.1em;margin:2em 0 .5em}
table{border-collapse:collapse;width:100%}td,th{padding:.25em .6em;border-bottom:1px solid #dfe4ea;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}tr.chosen{background:#e7f4ea}.bad{color:#a4262c}.good{color:#1a7f37}
.grid{display:flex;flex-wrap:wrap;gap:.8em}.grid figure{margin:0;width:128px;font-size:.8em}.grid img{image-rendering:auto}
svg text{font:12px system-ui,sans-serif;fill:#1c2430}.mute{color:#5b6673}
"""


def render(report: dict[str, Any], pictures: dict[int, Any]) -> str:
    """The page.

    Args:
        pictures: by sample, uint8 H x W x C, of samples that changed.
    """
    title = f"{report['model']} {report['version']} for {report['class']}"
    verdict = (
        "<b class=good>fits all budgets</b>"
        if report["fits"]
        else f"<b class=bad>misses: {escape('; '.join(report['misses']) or report['why'])}</b>"
        f"{'' if report['shipped'] else ' · nothing is shipped'}"
    )
    parts = [
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{escape(title)}</title><style>{_STYLE}</style>",
        f"<h1>{escape(title)}</h1><p>{escape(report['engine'])} {escape(report['engine_version'])} · {verdict}<br>",
        f"<span class=mute>{escape(report['why'])}</span></p>",
        "".join(f"<p class=bad>{escape(one)}</p>" for one in report["cautions"]),
        "<h2>Figures</h2>" + _figures(report),
        "<h2>Candidates: accuracy, latency, bytes</h2>" + _front_plot(report) + _candidates(report),
        "<h2>Noise of each layer in int8</h2>" + _layers(report),
        _pruning("Pruning", report["pruning"]),
        _pruning("Pruning by tfmot, of the Keras network", report["tfmot"]),
        "<h2>Changed answers</h2>" + _changed(report, pictures),
        f"<p class=mute>key {escape(report['key'])}</p></html>",
    ]
    return "\n".join(parts)


def _figures(report: dict[str, Any]) -> str:
    figures, budgets = report["figures"], report["budgets"]
    rows = [("agreement with the float model", _share(figures, "agreement"))]
    rows += [(share_title(name), _told_share(s)) for name, s in sorted(figures["shares"].items())]
    rows += [(f"kept of {label!r}", _counted(one)) for label, one in figures["by_label"].items()]
    rows += [(f"noise of output {name}", _noise(db)) for name, db in figures["sqnr_db_by_output"].items()]
    rows += [
        ("bytes sent", f"{figures['wire_bytes']:,} (float {figures['float_wire_bytes']:,})"),
        (
            "bytes",
            f"{figures['compiled_bytes']:,} (float {figures['float_bytes']:,}, {figures['float_bytes'] / figures['compiled_bytes']:.2f} times)",
        ),
        ("latency p50 / p95", _times(figures, exact=_exact(report["recipe"]))),
        *([("calibrated on", _calibrated(report["calibration"]))] if report["recipe"]["precision"] == "int8" else []),
        *([("answers above are those of", figures["stand_in"])] if figures["stand_in"] else []),
        ("peak memory", _or(figures["peak_memory_bytes"], lambda v: f"{v / 1e6:.0f} MB")),
    ]
    allowed = {f"kept of {label!r}": f"at least {budgets['min_per_label']:.4g}" for label in figures["by_label"]} | {
        "agreement with the float model": f"at least {budgets['min_agreement']:.4g}",
        "bytes": _or(budgets["size_bytes"], lambda v: f"at most {v:,}", ""),
        "latency p50 / p95": f"p95 at most {budgets['latency_p95_ms']:g} ms",
        "peak memory": f"at most {budgets['memory_bytes'] / 1e6:.0f} MB",
    }
    cells = (f"<tr><td>{escape(n)}<td class=n>{escape(v)}<td class=n>{escape(allowed.get(n, ''))}" for n, v in rows)
    head = f"<tr><th>{'what is shipped' if report['shipped'] else 'what came closest'}<th class=n><th class=n>budget"
    return f"<table>{head}{''.join(cells)}</table>"


def _calibrated(told: dict[str, int]) -> str:
    spread = f", evenly spread over {told['of']:,}" if told["of"] > told["samples"] else ""
    return f"{told['samples']} samples{spread}"


def _exact(recipe: dict[str, Any]) -> bool:
    """As :attr:`Recipe.exact` has it."""
    return recipe["precision"] == "fp32" and not recipe["pruned"]


def _noise(db: float) -> str:
    if abs(db) < EXACT_DB:
        return f"{db:.1f} dB below it"
    return "none" if db > 0 else "answers that are no numbers"


def _times(figures: dict[str, Any], *, exact: bool) -> str:
    """Args: ``exact``: it is the float model; what two runs of one network differ by is no gain."""
    if figures["p50_ms"] is None:
        return "unmeasured here; the board's acceptance decides"
    told = f"{figures['p50_ms']:.2f} / {figures['p95_ms']:.2f} ms, timed on {figures['timed_on']}"
    if exact:
        return f"{told} (the float model itself)"
    if figures["float_p50_ms"] is None:  # a board that holds the compiled model may be too small for the float one
        return f"{told} (float unmeasured)"
    times = figures["float_p50_ms"] / figures["p50_ms"]
    return f"{told} (float {figures['float_p50_ms']:.2f} / {figures['float_p95_ms']:.2f}, {times:.2f} times as fast)"


def _relative(candidate: dict[str, Any]) -> float | None:
    """As :attr:`Figures.relative_time` has it, and 1 for the float model itself."""
    figures = candidate["figures"]
    if figures["p50_ms"] is None or not figures["float_p50_ms"]:
        return None
    return 1.0 if _exact(candidate["recipe"]) else float(figures["p50_ms"] / figures["float_p50_ms"])


def _share(figures: dict[str, Any], name: str) -> str:
    if figures[name] is None:
        return "unmeasured"
    return f"{figures[name]:.4f} [{figures[f'{name}_low']:.4f}, {figures[f'{name}_high']:.4f}] of {figures['samples']} samples"


def _told_share(share: dict[str, Any]) -> str:
    return f"{share['value']:.4f} [{share['low']:.4f}, {share['high']:.4f}], {share['count']} of {share['of']}"


def _counted(share: dict[str, Any]) -> str:
    return f"{share['value']:.4f}, {share['count']:,} of {share['of']:,}"


def _or(value: Any, told: Any, otherwise: str = "unmeasured") -> str:
    return otherwise if value is None else str(told(value))


def _candidates(report: dict[str, Any]) -> str:
    head = "<tr><th>candidate<th class=n>agreement<th class=n>noise dB<th class=n>bytes<th class=n>p50 ms<th class=n>of float<th>front<th>misses"
    rows = []
    for one in report["candidates"]:
        f = one["figures"]
        cells = [
            _or(f["agreement"], lambda v: f"{v:.4f}"), _or(f["sqnr_db"], lambda v: f"{v:.1f}" if abs(v) < EXACT_DB else "none" if v > 0 else "no numbers"), f"{f['compiled_bytes']:,}",
            _or(f["p50_ms"], lambda v: f"{v:.2f}"), _or(_relative(one), lambda v: f"{v:.2f}"),
        ]  # fmt: skip
        numbers = "".join(f"<td class=n>{cell}" for cell in cells)
        rows.append(
            f"<tr{' class=chosen' if one['chosen'] else ''}><td>{escape(one['told'])}{numbers}<td>{'●' if one['on_front'] else ''}"
            f"<td class=bad>{escape('; '.join(one['misses']))}"
        )
    left = "".join(f"<li>{escape(o['told'])}: {escape(o['reason'])}" for o in report["left_out"])
    told = f"<p>Could not be made:</p><ul>{left}</ul>" if left else ""
    return f"<table>{head}{''.join(rows)}</table>{told}"


def _pruning(title: str, pruned: dict[str, Any] | None) -> str:
    """Each step, how it was judged on training samples set aside, and why there are no more."""
    if pruned is None:
        return ""
    rows = []
    for tried in pruned["steps"]:
        step, accuracy = tried["step"], tried["accuracy"]
        told = f"{step['number']}{', tuned again' if step['again'] else ''}"
        right = "" if accuracy is None else f"{accuracy:.4f} (float {tried['float_accuracy']:.4f})"
        rows.append(
            f"<tr><td>{told}<td class=n>{tried['sparsity']:.1%}<td class=n>{tried['agreement']:.4f}"
            f"<td class=n>{right}<td class=bad>{escape('; '.join(tried['misses']))}"
        )
    head = "<tr><th>step<th class=n>weights gone<th class=n>agreement<th class=n>accuracy<th>misses"
    ended = escape(pruned["stopped"]) or "The target was reached."
    return f"<h2>{escape(title)}</h2><table>{head}{''.join(rows)}</table><p>{ended}</p>"


def _front_plot(report: dict[str, Any]) -> str:
    """Latency across (bytes, where times are unmeasured), agreement up, the radius as the bytes."""
    shown = [c for c in report["candidates"] if c["figures"]["sqnr_db"] is not None]
    if len(shown) < 2:
        return "<p class=mute>One candidate only: nothing to draw.</p>"
    times = [time for c in shown if (time := _relative(c)) is not None]
    timed = len(times) == len(shown)
    across = times if timed else [c["figures"]["compiled_bytes"] / 1e6 for c in shown]
    up = [c["figures"]["agreement"] for c in shown]
    budget = report["budgets"]["min_agreement"]
    x, y = _scale(across, LEFT, WIDTH - 20), _scale([*up, budget], HEIGHT - BOTTOM, 20)
    most = max(c["figures"]["compiled_bytes"] for c in shown)
    marks = "".join(
        f"<circle cx={x(a):.1f} cy={y(b):.1f} r={3 + 9 * math.sqrt(c['figures']['compiled_bytes'] / most):.1f} "
        f"fill='{'#1a7f37' if c['chosen'] else '#3b6fb6' if c['on_front'] else '#b6bfca'}' fill-opacity=.7>"
        f"<title>{escape(c['told'])}: agreement {b:.4f}, {c['figures']['compiled_bytes']:,} bytes</title></circle>"
        for c, a, b in zip(shown, across, up, strict=True)
    )
    axes = _axes(across, up, x, y, "p50, of the float model's in the same process" if timed else "MB", "agreement")
    axes += f"<path d='M{LEFT},{y(budget):.1f}H{WIDTH - 10}' stroke='#a4262c' stroke-dasharray='4 4'/>"
    return (
        f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' width=100% role=img aria-label='candidates'>{axes}{marks}</svg>"
        f"<p class=mute>Green: {'shipped' if report['shipped'] else 'closest to the budgets'}. Blue: on the front. The larger, the more bytes. "
        "Dashed: the agreement that the class asks for.</p>"
    )


def _scale(values: list[float], low: float, high: float) -> Any:
    a, b = min(values), max(values)
    pad = (b - a) * 0.06 or max(abs(a) * 0.06, 1e-6)
    return lambda v: low + (v - a + pad) / (b - a + 2 * pad) * (high - low)


def _axes(across: list[float], up: list[float], x: Any, y: Any, name_x: str, name_y: str) -> str:
    floor = HEIGHT - BOTTOM
    parts = [f"<path d='M{LEFT},10V{floor}H{WIDTH - 10}' fill=none stroke='#8894a2'/>"]
    for value in (min(across), max(across)):
        parts.append(f"<text x={x(value):.1f} y={floor + 16} text-anchor=middle>{value:.3g}</text>")
    for value in sorted({min(up), max(up)}):
        parts.append(f"<text x={LEFT - 6} y={y(value) + 4:.1f} text-anchor=end>{value:.3f}</text>")
    parts.append(f"<text x={WIDTH / 2} y={HEIGHT - 6} text-anchor=middle>{name_x}</text><text x=4 y=14>{name_y}</text>")
    return "".join(parts)


def _layers(report: dict[str, Any]) -> str:
    layers = report["layers"][:MOST_LAYERS]
    if not layers:
        return (
            "<p class=mute>Not measured: int8 was accurate enough as it was, was not asked for or could not be made or run here, or the search was told not "
            "to look.</p>"
        )
    kept = set(report["in_float"])
    db = [10 * math.log10(max(unit["noise"], 1e-12)) for unit in layers]
    low = min(db) - 3
    rows = []
    for place, (unit, value) in enumerate(zip(layers, db, strict=True)):
        name = unit["nodes"][0] if len(unit["nodes"]) == 1 else f"{unit['kind']} x {len(unit['nodes'])}"
        colour = "#1a7f37" if set(unit["nodes"]) <= kept else "#3b6fb6"
        length = max(1.0, (value - low) / max(max(db) - low, 1e-6) * 310)
        rows.append(
            f"<text x=250 y={place * 18 + 14} text-anchor=end>{escape(name[-38:])}</text>"
            f"<rect x=256 y={place * 18 + 4} width={length:.1f} height=12 fill='{colour}'/>"
            f"<text x={262 + length:.1f} y={place * 18 + 14}>{value:.1f} dB</text>"
        )
    return (
        f"<svg viewBox='0 0 {WIDTH} {len(layers) * 18 + 8}' width=100% role=img aria-label='noise by layer'>{''.join(rows)}</svg>"
        "<p class=mute>Noise on the outputs when that layer alone is int8. Green: left in float.</p>"
    )


def _became(sample: dict[str, Any]) -> str:
    """The two answers, where they have words."""
    return f": {escape(sample['float'])} → {escape(sample['compiled'])}" if "float" in sample else ""


def _right(sample: dict[str, Any]) -> str:
    """The right answer, where the sample is labelled."""
    return f"; right: {escape(sample['truth'])}" if "truth" in sample else ""


def _changed(report: dict[str, Any], pictures: dict[int, Any]) -> str:
    changed = report["changed"]
    if changed["count"] is None:
        died = any(one["died"] for one in report["candidates"] if one["chosen"])
        if died:
            return "<p class=bad>The engine died; there are no answers.</p>"
        return "<p class=mute>Unmeasured: this host can't run it, and has no answers of it.</p>"
    if not changed["count"]:
        return "<p class=good>None.</p>"
    rows = "".join(
        f"<tr><td>{escape(c['float'])}<td>{escape(c['compiled'])}<td class=n>{c['count']}" for c in changed["confusion"]
    )
    figures = "".join(
        f"<figure><img alt='' width={THUMBNAIL} src='{_png(pictures[s['sample']])}'><figcaption>no. {s['sample']}"
        f"{_became(s)}{_right(s)}</figcaption></figure>"
        for s in changed["samples"]
        if s["sample"] in pictures
    )
    which = "" if rows else f": no. {', '.join(str(s['sample']) for s in changed['samples'])}"
    which += ", ..." if which and len(changed["samples"]) < changed["count"] else ""
    table = f"<table><tr><th>float model<th>compiled<th class=n>times{rows}</table>" if rows else ""
    return f"<p>{changed['count']} of {report['figures']['samples']} samples{which}.</p>{table}<div class=grid>{figures}</div>"


def _png(picture: Any) -> str:
    image = Image.fromarray(picture[..., 0] if picture.shape[-1] == 1 else picture)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
