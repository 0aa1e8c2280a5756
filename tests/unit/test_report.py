from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from edgefleet_controller.adding import _together
from edgefleet_controller.compile import report
from edgefleet_controller.compile.comparing import compare
from edgefleet_controller.compile.evaluator import Measured
from edgefleet_controller.compile.port import Figures, Share
from edgefleet_controller.compile.pruning import Step, Tried, ended
from edgefleet_controller.compile.quality import EXACT_DB
from edgefleet_controller.compile.recipe import FLOAT, PLAIN_TENSORFLOW, Recipe
from edgefleet_controller.compile.search import Candidate, Choice, LeftOut, Unit
from edgefleet_controller.model_version import AcceptanceLimits, ModelVersion, Split
from edgefleet_shared.artifact import Layout
from edgefleet_shared.contract import PictureEncoding, TensorSpec
from edgefleet_shared.errors import ModelError, QualityError
from safetensors.numpy import save
from support.networks import device_class


def figures(**changes: Any) -> Figures:
    fields: dict[str, Any] = {
        "engine": "onnxruntime", "engine_version": "1", "float_bytes": 400, "compiled_bytes": 100, "samples": 3, "agreement": 0.667,
        "agreement_low": 0.2, "agreement_high": 0.94, "sqnr_db": 20.0, "p50_ms": 5.0, "p95_ms": 6.0, "float_p50_ms": 10.0,
        "float_p95_ms": 11.0, "peak_memory_bytes": 10**8, "sqnr_db_by_output": {"y": 20.0},
    }  # fmt: skip
    return Figures(**(fields | changes))


def made(folder: Path) -> tuple[ModelVersion, Choice, Measured, dict[str, Any], Layout]:
    layout = Layout(folder)
    pictures = np.random.default_rng(0).integers(0, 255, (3, 8, 8, 3), dtype=np.uint8)
    split = Split(layout.put(bytes(save({"x": pictures}))).digest, 3)
    limits = AcceptanceLimits(min_agreement=0.9, min_cosine=0.8, tolerance_abs=0.1, tolerance_rel=0.0, min_golden=8)
    version = ModelVersion(
        schema=1, model="m", version="1", network=split.digest, inputs=(TensorSpec("x", "FP32", (1, 3, 8, 8)),),
        outputs=(TensorSpec("y", "FP32", (1, 2)),), output_kind="classification",
        encoding=PictureEncoding(mean=(0.0,), std=(1.0,)), labels=("cat", "<script>alert(1)</script>"), calibration=split,
        calibration_method="minmax", holdout=split, golden=split, acceptance=limits,
    )  # fmt: skip
    chosen = Candidate(recipe=Recipe(), figures=figures(), misses=())
    beaten = Candidate(
        recipe=Recipe(ranges="mse"), figures=figures(agreement=0.5, p50_ms=9.0, sqnr_db=10.0), misses=("x",)
    )
    units = (Unit(nodes=("stem",), kind="Conv", noise=0.01, weight_bytes=10),)
    choice = Choice(candidates=(chosen, beaten), chosen=chosen, nearest=chosen, why="best", sensitivity=units)
    references = {"y": np.array([[1, 0], [1, 0], [0, 1]], np.float32)}
    outputs = {"y": np.array([[1, 0], [0, 1], [0, 1]], np.float32)}
    return version, choice, Measured(chosen, outputs, (1,)), references, layout


def test_the_front_holds_times_against_the_float_models_of_the_same_round(tmp_path: Path) -> None:
    """Rounds fall into busy and quiet moments: 40 ms beside a float model of 80 is faster than 30 beside one of 31."""
    version, choice, final, references, layout = made(tmp_path)
    busy = Candidate(recipe=Recipe(), figures=figures(p50_ms=40.0, float_p50_ms=80.0), misses=())
    quiet = Candidate(
        recipe=Recipe(ranges="mse"), figures=figures(p50_ms=30.0, float_p50_ms=31.0, sqnr_db=10.0), misses=()
    )
    several = msgspec.structs.replace(choice, candidates=(busy, quiet), chosen=busy)
    written = report.write(version, device_class(), several, Measured(busy, final.outputs, ()), references, layout)
    told = msgspec.json.decode(layout.read(written.report, 10**7))
    assert [c["on_front"] for c in told["candidates"]] == [True, False]
    page = layout.read(written.page, 10**7).decode()
    assert "<td class=n>40.00<td class=n>0.50" in page
    assert "<td class=n>30.00<td class=n>0.97" in page


def test_the_report_holds_the_front_the_layers_and_what_changed_into_what(tmp_path: Path) -> None:
    version, choice, final, references, layout = made(tmp_path)
    written = report.write(version, device_class(), choice, final, references, layout)
    told = msgspec.json.decode(layout.read(written.report, 10**7))
    assert [(c["chosen"], c["on_front"]) for c in told["candidates"]] == [(True, True), (False, False)]
    assert told["layers"][0]["nodes"] == ["stem"]
    assert told["changed"]["count"] == 1
    assert told["changed"]["confusion"] == [{"float": "cat", "compiled": "<script>alert(1)</script>", "count": 1}]
    assert told["budgets"]["min_agreement"] == 0.7


def test_the_right_answer_stands_beside_a_changed_one_in_the_same_words(tmp_path: Path) -> None:
    version, choice, final, references, layout = made(tmp_path)
    version = msgspec.structs.replace(version, truth=("0", "1", "1"))
    written = report.write(version, device_class(), choice, final, references, layout)
    (changed,) = msgspec.json.decode(layout.read(written.report, 10**7))["changed"]["samples"]
    assert (changed["compiled"], changed["truth"]) == ("<script>alert(1)</script>",) * 2
    assert "right: &lt;script&gt;alert(1)&lt;/script&gt;" in layout.read(written.page, 10**7).decode()


def test_the_page_is_one_file_with_its_plots_and_pictures_and_runs_nothing(tmp_path: Path) -> None:
    version, choice, final, references, layout = made(tmp_path)
    page = layout.read(report.write(version, device_class(), choice, final, references, layout).page, 10**7).decode()
    assert page.count("<svg") == 2
    assert page.count("data:image/png;base64,") == 1
    assert "<script" not in page, "labels are escaped"
    assert not re.search(r"""(?:src|href)\s*=\s*['"](?!data:)""", page)
    assert "://" not in page


def test_the_float_model_is_told_as_itself_and_no_noise_as_none(tmp_path: Path) -> None:
    """What two runs of one network differ by is no gain, and 200 dB are no measurement."""
    version, choice, _, references, layout = made(tmp_path)
    own = figures(
        agreement=1.0,
        p50_ms=10.0,
        float_p50_ms=11.5,
        sqnr_db=EXACT_DB,
        sqnr_db_by_output={"y": EXACT_DB, "z": -EXACT_DB},
    )
    exact = Candidate(recipe=FLOAT, figures=own, misses=())
    shipped = msgspec.structs.replace(choice, candidates=(exact, *choice.candidates), chosen=exact)
    page = layout.read(
        report.write(version, device_class(), shipped, Measured(exact, {}, ()), references, layout).page, 10**7
    ).decode()
    assert "(the float model itself)" in page
    assert "times as fast" not in page
    assert "<td class=n>10.00<td class=n>1.00" in page
    assert "<td>noise of output y<td class=n>none<" in page
    assert "<td>noise of output z<td class=n>answers that are no numbers<" in page
    assert "200.0" not in page


def test_answers_that_have_no_words_are_told_by_their_number(tmp_path: Path) -> None:
    version, choice, final, references, layout = made(tmp_path)
    raw = msgspec.structs.replace(version, output_kind="raw", outputs=(TensorSpec("left_eye", "FP32", (1, 2)),))
    within = {"values within tolerance, left_eye": Share(0.5, 0.4, 0.6, 3, 6), "box_recall": Share(0.5, 0.4, 0.6, 3, 6)}
    candidate = msgspec.structs.replace(final.candidate, figures=figures(shares=within))
    sides = ({"left_eye": side["y"]} for side in (final.outputs, references))
    measured = Measured(candidate, next(sides), (1, 2))
    written = report.write(raw, device_class(), choice, measured, next(sides), layout)
    changed = msgspec.json.decode(layout.read(written.report, 10**7))["changed"]
    assert (changed["count"], changed["confusion"], changed["samples"]) == (2, [], [{"sample": 1}, {"sample": 2}])
    page = layout.read(written.page, 10**7).decode()
    assert "<p>2 of 3 samples: no. 1, 2.</p>" in page
    assert "another" not in page
    assert "<td>values within tolerance, left_eye<" in page
    assert "<td>box recall<" in page


def test_pruning_is_told_step_by_step_with_where_it_stopped_and_why(tmp_path: Path) -> None:
    version, choice, final, references, layout = made(tmp_path)
    good = Tried(
        step=Step(number=1, structured=0.3, unstructured=0.0), key="a", sparsity=0.31, agreement=0.99, accuracy=0.91,
        float_accuracy=0.92, misses=(),
    )  # fmt: skip
    bad = msgspec.structs.replace(
        good, step=Step(number=2, structured=0.6, unstructured=0.0, again=True), sparsity=0.62, misses=("<lost>",)
    )
    choice = msgspec.structs.replace(choice, pruning=ended([good, bad]))
    written = report.write(version, device_class(), choice, final, references, layout)
    told = msgspec.json.decode(layout.read(written.report, 10**7))["pruning"]
    assert [step["sparsity"] for step in told["steps"]] == [0.31, 0.62]
    assert told["stopped"].startswith(
        "pruning stopped where 62% of the weights were gone: <lost>, after being tuned twice"
    )
    page = layout.read(written.page, 10**7).decode()
    assert "2, tuned again" in page
    assert "31.0%" in page
    assert "<lost>" not in page


def test_a_candidate_that_could_not_be_made_is_told_with_its_reason(tmp_path: Path) -> None:
    version, choice, final, references, layout = made(tmp_path)
    left = LeftOut(recipe=PLAIN_TENSORFLOW, reason="it has no <operator>", lasting=True)
    choice = msgspec.structs.replace(choice, left_out=(left,))
    written = report.write(version, device_class(), choice, final, references, layout)
    (told,) = msgspec.json.decode(layout.read(written.report, 10**7))["left_out"]
    assert (told["told"], told["reason"]) == (PLAIN_TENSORFLOW.told(), "it has no <operator>")
    assert "no &lt;operator&gt;" in layout.read(written.page, 10**7).decode()


def test_an_engine_that_died_has_a_report_too(tmp_path: Path) -> None:
    version, choice, final, references, layout = made(tmp_path)
    dead = msgspec.structs.replace(final.candidate, died=True, misses=("engine died: SIGSEGV",), figures=Figures(
        engine="e", engine_version="1", float_bytes=4, compiled_bytes=1, samples=3))  # fmt: skip
    choice = Choice(candidates=(dead,), chosen=None, nearest=dead, why="nothing fits")
    written = report.write(version, device_class(), choice, Measured(dead, {}, ()), references, layout)
    page = layout.read(written.page, 10**7).decode()
    assert "engine died: SIGSEGV" in page
    assert "The engine died; there are no answers." in page


def test_what_can_not_be_run_here_is_not_told_as_dead_nor_its_layers_as_good(tmp_path: Path) -> None:
    version, choice, final, references, layout = made(tmp_path)
    unheard = msgspec.structs.replace(final.candidate, figures=Figures(
        engine="e", engine_version="1", float_bytes=4, compiled_bytes=1, samples=3, unmeasured=("agreement", "latency", "memory")))  # fmt: skip
    choice = Choice(candidates=(unheard,), chosen=unheard, nearest=unheard, why="the only one tried")
    written = report.write(version, device_class(), choice, Measured(unheard, {}, ()), references, layout)
    page = layout.read(written.page, 10**7).decode()
    assert "died" not in page
    assert "Unmeasured: this host can't run it" in page
    assert "good enough" not in page


def test_a_compile_that_ships_nothing_tells_how_far_its_candidates_were_from_the_budgets(tmp_path: Path) -> None:
    version, choice, final, references, layout = made(tmp_path)
    missed = msgspec.structs.replace(final.candidate, misses=("agreement 0.667, budget 0.700",))
    none = Choice(candidates=(missed, choice.candidates[1]), chosen=None, nearest=missed, why="nothing fits")
    written = report.write(
        version, device_class(), none, Measured(missed, final.outputs, (1,)), references, layout, shipped=False
    )
    told = msgspec.json.decode(layout.read(written.report, 10**7))
    assert (told["fits"], told["shipped"]) == (False, False)
    page = layout.read(written.page, 10**7).decode()
    assert "misses: agreement 0.667, budget 0.700</b> · nothing is shipped" in page
    assert "<td class=n>at least 0.7" in page
    assert "Green: closest to the budgets" in page
    assert "stroke-dasharray" in page, "the budget is a line in the plot"


ALIKE = ("classification", "classification")


def artifact(name: str, **changes: Any) -> dict[str, Any]:
    quality = msgspec.to_builtins(figures(**changes)) | {"verdict": "passed", "misses": [], "recipe": "int8"}
    return {"class": name, "quality": quality, "timings": {"p50_ms": quality["p50_ms"], "float_p50_ms": 10.0}}


def test_versions_are_compared_class_by_class_and_overlapping_intervals_are_alike() -> None:
    old = artifact("a", agreement=0.9, agreement_low=0.85, agreement_high=0.94)
    rows = {
        r.figure: r
        for r in compare([old], [artifact("a", agreement=0.92, agreement_low=0.88, agreement_high=0.95)], ALIKE)
    }
    assert rows["agreement"].meaning == "alike"
    worse = artifact("a", agreement=0.5, agreement_low=0.4, agreement_high=0.6, compiled_bytes=90, p50_ms=20.0)
    rows = {r.figure: r for r in compare([old], [worse], ALIKE)}
    assert rows["agreement"].meaning == "worse"
    assert rows["bytes"].meaning == "-10.0%, better"
    assert rows["times as fast as float"].meaning == "-75.0%, worse"


def test_shares_of_unlike_tasks_are_shown_and_not_compared() -> None:
    old, new = artifact("a", agreement=0.5, agreement_low=0.4, agreement_high=0.6), artifact("a", agreement=0.9)
    rows = {r.figure: r for r in compare([old], [new], kinds=("classification", "detection"))}
    assert rows["judged as"][2:] == ("classification", "detection", "")
    assert (rows["agreement"].after[:3], rows["agreement"].meaning) == ("0.9", "")
    assert "judged as" not in {r.figure for r in compare([old], [new], kinds=("detection", "detection"))}


def test_a_class_that_only_one_version_has_is_told() -> None:
    (row,) = compare([], [artifact("a")], ALIKE)
    assert (row.device_class, row.before, row.after) == ("a", "not compiled", "compiled")


def test_a_class_whose_last_compile_failed_is_told_with_why() -> None:
    failed = [{"class": name, "error": {"message": "size 9 bytes, budget 1"}} for name in ("a", "b")]
    rows = compare([artifact("a")], [artifact("a")], ALIKE, ([], failed))
    told = "failed: size 9 bytes, budget 1"
    assert [row[:4] for row in rows if row.device_class == "b"] == [("b", "artifact", "not compiled", told)]
    assert ("a", "last compile", "done", told, "") in rows
    assert "last compile" not in {row.figure for row in compare([artifact("a")], [artifact("a")], ALIKE)}


def test_the_float_model_is_as_fast_as_itself() -> None:
    sides = [artifact("a", p50_ms=p50_ms) for p50_ms in (9.0, 11.0)]
    for side in sides:
        side["quality"]["recipe"] = "fp32"
    (row,) = (r for r in compare(sides[:1], sides[1:], ALIKE) if r.figure == "times as fast as float")
    assert row[2:] == ("1.00", "1.00", "")


def test_shares_that_one_side_lacks_are_unmeasured() -> None:
    new = artifact("a", shares={"box_recall": Share(0.9, 0.8, 0.95, 9, 10)})
    rows = {r.figure: r for r in compare([artifact("a")], [new], ALIKE)}
    assert (rows["box recall"].before, rows["box recall"].meaning) == ("unmeasured", "")


def test_several_classes_that_failed_each_tell_their_own_error() -> None:
    one = QualityError("agreement 0.2", hint="other pictures", report="sha256:1", page="sha256:2")
    both = _together({"board-a": one, "board-b": ModelError("no operator Softplus")})
    assert isinstance(both, QualityError)
    assert both.message == "2 classes failed\nboard-a: agreement 0.2\nboard-b: no operator Softplus"
    assert both.hint == "other pictures"
    assert both.as_dict().keys() == {"code", "message", "hint"}, "one class's report is not that of both"
    assert _together({"board-a": one}) is one
