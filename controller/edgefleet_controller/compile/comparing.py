"""Stage 2, compile: two versions side by side. Pure: receives what the controller knows of their artifacts, hands on rows per class."""

from __future__ import annotations

from typing import Any, NamedTuple

from edgefleet_controller.compile.port import share_title
from edgefleet_controller.compile.recipe import FLOAT

Artifact = dict[str, Any]  # as the API shows it
Failure = dict[str, Any]  # likewise: a class and an error


class Row(NamedTuple):
    """One figure of one class: before, after, and what that means (empty where it is no more than a difference)."""

    device_class: str
    figure: str
    before: str
    after: str
    meaning: str


def compare(
    before: list[Artifact],
    after: list[Artifact],
    kinds: tuple[str, str],
    failed: tuple[list[Failure], list[Failure]] = ([], []),
) -> list[Row]:
    """Figures of both for every class that either has. Shares whose 95 % intervals overlap are called alike: so few samples can't tell
    them apart.

    Args:
        kinds: of the versions' outputs: shares of two kinds are of unlike things, and neither is the better one.
        failed: of both, the classes whose last compile failed.
    """
    sides = [{artifact["class"]: artifact for artifact in side} for side in (before, after)]
    failures = [{one["class"]: f"failed: {one['error']['message']}" for one in side} for side in failed]
    rows: list[Row] = []
    for name in sorted({*sides[0], *sides[1], *failures[0], *failures[1]}):
        pair = [side.get(name) for side in sides]
        whys = [side.get(name) for side in failures]
        if pair[0] is None or pair[1] is None:
            states = ["compiled" if one else why or "not compiled" for one, why in zip(pair, whys, strict=True)]
            rows.append(Row(name, "artifact", states[0], states[1], ""))
            continue
        if any(whys):
            rows.append(Row(name, "last compile", whys[0] or "done", whys[1] or "done", ""))
        if kinds[0] != kinds[1]:
            rows.append(Row(name, "judged as", *kinds, ""))
        rows += _figures(name, pair[0], pair[1], of_one_kind=kinds[0] == kinds[1])
    return rows


def _figures(name: str, before: Artifact, after: Artifact, *, of_one_kind: bool) -> list[Row]:
    old, new = before["quality"], after["quality"]
    rows = [Row(name, "verdict", _verdict(old), _verdict(new), "")]
    rows.append(Row(name, "recipe", old.get("recipe", ""), new.get("recipe", ""), ""))
    rows.append(_share(name, "agreement", _agreement(old), _agreement(new), judged=of_one_kind))
    shares = [one.get("shares") or {} for one in (old, new)]
    rows += [
        _share(name, share_title(figure), shares[0].get(figure), shares[1].get(figure), judged=of_one_kind)
        for figure in sorted({*shares[0], *shares[1]})
    ]
    rows.append(
        _number(name, "noise, dB below the output", old.get("sqnr_db"), new.get("sqnr_db"), "{:.1f}", better="up")
    )
    rows.append(_number(name, "bytes", old["compiled_bytes"], new["compiled_bytes"], "{:,}", better="down"))
    rows.append(_number(name, "peak memory", old["peak_memory_bytes"], new["peak_memory_bytes"], "{:,}", better="down"))
    times = [_speed(one) for one in (before, after)]
    rows.append(_number(name, "times as fast as float", times[0], times[1], "{:.2f}", better="up"))
    return rows


def _verdict(quality: dict[str, Any]) -> str:
    return "; ".join(quality["misses"]) or str(quality["verdict"])


def _agreement(quality: dict[str, Any]) -> dict[str, Any] | None:
    if quality.get("agreement") is None:
        return None
    return {"value": quality["agreement"], "low": quality["agreement_low"], "high": quality["agreement_high"]}


def _speed(artifact: Artifact) -> float | None:
    """Each was timed against float in its own process, so this compares across runs where times alone do not; float itself needs no timing."""
    compiled, of_float = (artifact["timings"].get(name) for name in ("p50_ms", "float_p50_ms"))
    if not compiled or not of_float:
        return None
    return 1.0 if artifact["quality"].get("recipe") == FLOAT.told() else float(of_float / compiled)


def _share(name: str, figure: str, old: dict[str, Any] | None, new: dict[str, Any] | None, *, judged: bool) -> Row:
    """Args: ``judged``: whether one can be better than the other."""
    told = ["unmeasured" if s is None else f"{s['value']:.4f} [{s['low']:.3f}, {s['high']:.3f}]" for s in (old, new)]
    meaning = ""
    if judged and old is not None and new is not None:
        if new["low"] > old["high"]:
            meaning = "better"
        elif new["high"] < old["low"]:
            meaning = "worse"
        else:
            meaning = "alike"
    return Row(name, figure, told[0], told[1], meaning)


def _number(name: str, figure: str, old: float | None, new: float | None, form: str, *, better: str) -> Row:
    told = ["unmeasured" if value is None else form.format(value) for value in (old, new)]
    meaning = ""
    if old and new is not None and figure != "noise, dB below the output":
        change = new / old - 1
        meaning = (
            ""
            if abs(change) < 0.005
            else f"{change:+.1%}" + (", better" if (change > 0) == (better == "up") else ", worse")
        )
    return Row(name, figure, told[0], told[1], meaning)
