from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from edgefleet_controller.compile.packing import contract
from edgefleet_controller.compile.port import Figures, chosen_options, engine_version, target_named
from edgefleet_controller.compile.quality import EXACT_DB, compare, inaccuracies, misses, refusals, wilson
from edgefleet_controller.compile.recipe import Recipe
from edgefleet_controller.compile.telling import vacuous
from edgefleet_controller.manifests.device_class import Accuracy
from edgefleet_controller.model_version import AcceptanceLimits, ModelVersion, Split
from edgefleet_shared.contract import BuildBudget, OutputTolerance, TensorSpec
from edgefleet_shared.errors import ManifestError, ToolchainError
from edgefleet_shared.reading import BoxDecoding
from support.networks import device_class

SPLIT = Split("sha256:" + "0" * 64, 4)


def version(kind: Any = "classification", **changes: Any) -> ModelVersion:
    fields: dict[str, Any] = {
        "schema": 1, "model": "m", "version": "1", "network": SPLIT.digest,
        "inputs": (TensorSpec("x", "FP32", (1, 3)),), "outputs": (TensorSpec("y", "FP32", (1, 3)),),
        "output_kind": kind, "encoding": None, "labels": (), "calibration": SPLIT, "calibration_method": "minmax",
        "holdout": SPLIT, "golden": SPLIT,
        "acceptance": AcceptanceLimits(min_agreement=0.9, min_cosine=0.8, tolerance_abs=0.1, tolerance_rel=0.0, min_golden=8),
    }  # fmt: skip
    return ModelVersion(**(fields | changes))


def figures(**changes: Any) -> Figures:
    fields: dict[str, Any] = {
        "engine": "onnxruntime", "engine_version": "1", "float_bytes": 100, "compiled_bytes": 50, "samples": 96,
        "agreement": 0.95, "agreement_low": 0.9, "agreement_high": 0.97, "p50_ms": 5.0, "float_p50_ms": 10.0,
        "peak_memory_bytes": 1000, "timed_on": "host",
    }  # fmt: skip
    return Figures(**(fields | changes))


def test_wilson_matches_published_values() -> None:
    # Newcombe 1998, table I: 81 of 263 and 0 of 20.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)


ROWS = np.array([[1, 2, 3], [3, 2, 1], [0, 9, 0], [5, 0, 1]], np.float32)


def test_equal_outputs_agree_fully() -> None:
    found = compare({"y": ROWS}, {"y": ROWS}, version()).figures
    assert (found["agreement"], found["cosine"]) == (1.0, 1.0)


def test_a_changed_answer_and_one_that_is_not_a_number_disagree() -> None:
    bad = ROWS.copy()
    bad[0] = [3, 2, 1]
    bad[1, 0] = np.nan
    found = compare({"y": bad}, {"y": ROWS}, version()).figures
    assert found["agreement"] == 0.5
    assert found["cosine"] == 0.0


def test_raw_outputs_agree_within_their_tolerance() -> None:
    near, far = ROWS + 0.09, ROWS.copy()
    far[2, 2] += 0.2
    assert compare({"y": near}, {"y": ROWS}, version("raw")).figures["agreement"] == 1.0
    assert compare({"y": far}, {"y": ROWS}, version("raw")).figures["agreement"] == 0.75


def test_how_many_values_of_a_raw_output_are_within_its_tolerance_is_told_beside_the_samples_that_are_whole() -> None:
    wide = np.zeros((4, 100), np.float32)
    have = wide.copy()
    have[:, 0] = 1.0
    outputs = (TensorSpec("grid", "FP32", (1, 100)),)
    found = compare({"grid": have}, {"grid": wide}, version("raw", outputs=outputs)).figures
    assert found["agreement"] == 0
    kept = found["shares"]["values within tolerance, grid"]
    assert (kept.value, kept.count, kept.of) == (0.99, 396, 400)
    assert (kept.low, kept.high) == wilson(0.99 * 4, 4), "the values of one sample hang together"
    (told,) = inaccuracies(figures(**found), Accuracy())
    assert "of all values of a sample" in told
    assert told.endswith("; values within tolerance: grid 0.9900")


@pytest.mark.parametrize(
    ("kind", "answers", "words"),
    [
        ("classification", ROWS, []),
        ("classification", np.vstack([ROWS[:3], [[5, 0, 5.1]]]), [r"0\.750 of 4 golden samples' answers"]),
        ("raw", ROWS + 0.05, []),
        ("raw", ROWS + np.float32([0, 0, 0.2]), [r"0\.667 of 4 golden samples' values"]),
        ("raw", ROWS * np.float32("nan"), ["0.000 of 4", "a cosine of nan"]),
    ],
)
def test_what_boards_would_refuse_is_told_by_their_own_rule(kind: str, answers: Any, words: list[str]) -> None:
    judged = version(kind)
    asked = contract(judged, device_class(), target_named("onnxruntime"))
    found = refusals({"y": np.asarray(answers, np.float32)}, {"y": ROWS}, asked, judged.reading)
    assert len(found) == len(words)
    for told, wanted in zip(found, words, strict=True):
        assert re.search(wanted, told), told


def test_outputs_of_another_name_or_shape_are_an_error() -> None:
    with pytest.raises(ToolchainError, match="'y' has shape none"):
        compare({"z": ROWS}, {"y": ROWS}, version())
    with pytest.raises(ToolchainError, match="has shape"):
        compare({"y": ROWS[:, :2]}, {"y": ROWS}, version())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"agreement": 0.5}, "agreement with the float model 0.500"),
        ({"agreement": None}, "could not be measured"),
        ({"p50_ms": 10.6}, "slower than float"),
        ({"p50_ms": 40.0, "float_p50_ms": 45.0}, "latency p50 40.00 ms on this host, budget 30 for p95"),
        ({"peak_memory_bytes": 2**31}, "peak memory"),
        ({"compiled_bytes": 61}, "size 61 bytes, budget 60"),
    ],
)
def test_each_budget_is_missed_by_name(changes: dict[str, Any], words: str) -> None:
    budgets = {"latency_p95_ms": 30.0, "memory_bytes": 2**30, "size_bytes": 60}
    spec = device_class(budgets=budgets).spec
    assert misses(figures(), spec, Recipe()) == []
    (found,) = misses(figures(**changes), spec, Recipe())
    assert words in found


def test_a_latency_budget_is_judged_here_where_the_median_is_over_it_and_this_host_timed_it() -> None:
    """Single runs above it may be the host's business, and a builder board has said so itself."""
    spec = device_class(budgets={"latency_p95_ms": 30.0, "memory_bytes": 2**30}).spec
    assert misses(figures(p50_ms=9.0, p95_ms=90.0), spec, Recipe()) == []
    assert misses(figures(p50_ms=40.0, float_p50_ms=45.0, timed_on="board-1"), spec, Recipe()) == []


def test_times_that_could_not_be_measured_are_no_miss() -> None:
    assert misses(figures(p50_ms=None, float_p50_ms=None), device_class().spec, Recipe()) == []


def test_the_contract_comes_from_the_manifests_and_the_class_overrides() -> None:
    target = target_named("onnxruntime")
    plain = contract(version(), device_class(), target)
    assert (plain.min_agreement, plain.min_cosine, plain.latency_p95_ms) == (0.9, 0.8, 100.0)
    assert plain.allowed_providers == ("CPUExecutionProvider",)
    own = {"min_agreement": 0.6, "allowed_providers": ["CUDA"], "max_celsius": 80.0}
    strict = contract(version(), device_class(acceptance=own), target)
    assert (strict.min_agreement, strict.allowed_providers, strict.max_celsius) == (0.6, ("CUDA",), 80.0)
    plain.check()
    strict.check()
    asked = {"time_limit_s": 60.0, "memory_bytes": 3 << 30, "disk_bytes": 100 << 20}
    built = contract(version(), device_class(build_budget=asked), target)
    assert built.build == BuildBudget(**asked)


def test_a_target_that_this_build_lacks_is_named_beside_those_it_has() -> None:
    with pytest.raises(ToolchainError, match=r"no target abacus installed; have: .*onnxruntime, openvino, .*tflite"):
        target_named("abacus")


def test_an_engines_version_is_that_of_what_compiles_for_it_and_of_nothing_else() -> None:
    packages, tools = {"onnxruntime": "1.32.0", "rknn_toolkit2": "2.5.0"}, {"atc": "7.0.0"}
    wanted = {"onnxruntime": "1.32.0", "rknn": "2.5.0", "acl": "7.0.0", "tensorrt": ""}
    assert {name: engine_version(target_named(name), packages, tools) for name in wanted} == wanted
    with pytest.raises(
        ToolchainError, match=r"its engine_package 'rknn_toolkit2' is no package of the toolchain rknn .*onnxruntime"
    ):
        engine_version(target_named("rknn"), {"onnxruntime": "1.32.0"}, {})


def test_neighbouring_weights_keep_from_overflow_on_x86_unless_the_class_promises_vnni() -> None:
    target = target_named("onnxruntime")
    for features, arch, weights in (
        ([], "x86_64", "pairs"),
        (["avx512_vnni"], "x86_64", "full"),
        ([], "aarch64", "full"),
    ):
        spec = device_class(cpu_features=features, arch=arch).spec
        assert target.options(spec, version())["weights"] == weights


@pytest.mark.parametrize(
    ("prefer", "aligned"), [("latency", True), ("accuracy", True), ("size", False), ("transfer", False)]
)
def test_a_class_that_wants_few_bytes_gets_no_channels_of_zeros(prefer: str, aligned: bool) -> None:
    spec = device_class(search={"prefer": prefer}).spec
    assert target_named("onnxruntime").options(spec, version())["aligned_channels"] == aligned


def test_the_models_options_for_a_target_win_over_the_class() -> None:
    spec = device_class(options={"float_first": 2}).spec
    defaults = {"float_first": 0}
    assert chosen_options("tflite", spec, version(), defaults) == {"float_first": 2}
    own = version(options={"tflite.float_first": 5, "openvino.preset": "mixed"})
    assert chosen_options("tflite", spec, own, defaults) == {"float_first": 5}


@pytest.mark.parametrize(
    ("options", "words"), [({"floaty": 1}, "no option 'floaty'"), ({"float_first": "2"}, "expected int")]
)
def test_an_option_that_a_target_would_ignore_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        chosen_options("tflite", device_class(options=options).spec, version(), {"float_first": 0})


def test_noise_of_scores_does_not_drown_in_pixels() -> None:
    """A head of one output: boxes to hundreds of pixels, scores below 1."""
    told = BoxDecoding(decoder="yolov8", threshold=0.25, nms_iou=0.45, match_iou=0.5)
    inputs, outputs = (TensorSpec("x", "FP32", (1, 3, 64, 64)),), (TensorSpec("head", "FP32", (1, 6, 100)),)
    detector = version("detection", detection=told, inputs=inputs, outputs=outputs)
    want = np.random.default_rng(0).random((4, 6, 100), np.float32)
    want[:, :4] *= 300
    have = want.copy()
    have[:, 4:] = 0
    found = compare({"head": have}, {"head": want}, detector).figures
    assert found["sqnr_db_by_output"] == {"head, boxes": EXACT_DB, "head, scores": 0.0}
    assert found["sqnr_db"] == 0.0


def test_noise_of_boxes_in_any_order_is_that_of_those_that_are_the_same() -> None:
    told = BoxDecoding(decoder="end_to_end", threshold=0.25, nms_iou=0.45, match_iou=0.5)
    inputs, outputs = (TensorSpec("x", "FP32", (1, 3, 64, 64)),), (TensorSpec("rows", "FP32", (1, 4, 6)),)
    detector = version("detection", detection=told, inputs=inputs, outputs=outputs)
    want = np.array(
        [[[0, 0, 20, 20, 0.9, 1], [40, 40, 60, 60, 0.8, 2], [5, 30, 9, 50, 0.7, 1], [1, 1, 9, 9, 0.1, 7]]], np.float32
    )
    have = want[:, [1, 2, 0, 3]]  # scores that lie near each other change places
    have[0, 3, :4] += 30  # below the threshold nobody sees it
    found = compare({"rows": have}, {"rows": want}, detector).figures
    assert set(found["sqnr_db_by_output"].values()) == {EXACT_DB}
    assert found["cosine"] == 1.0
    have[0, 0, 4] = 0.4
    moved = compare({"rows": have}, {"rows": want}, detector).figures
    expected = 10 * np.log10((0.9**2 + 0.8**2 + 0.7**2) / 0.4**2)
    assert moved["sqnr_db_by_output"]["rows, scores"] == pytest.approx(expected, abs=1e-3)
    assert moved["sqnr_db_by_output"]["rows, boxes"] == EXACT_DB
    have[0, 1, :4] = 0  # one that is gone is as much noise as it was
    gone = compare({"rows": have}, {"rows": want}, detector).figures
    assert gone["sqnr_db_by_output"]["rows, boxes"] < 15


def test_an_output_that_is_always_zero_does_not_hide_the_others_noise() -> None:
    both = version("raw", outputs=(TensorSpec("y", "FP32", (1, 3)), TensorSpec("z", "FP32", (1, 3))))
    want = {"y": np.ones((4, 3), np.float32), "z": np.zeros((4, 3), np.float32)}
    have = {"y": np.full((4, 3), 1.1, np.float32), "z": np.full((4, 3), 1e-3, np.float32)}
    assert compare(have, want, both).figures["sqnr_db"] == pytest.approx(20, abs=0.1)


def two_scales(**changes: Any) -> ModelVersion:
    """Places in pixels beside a score, within five of either."""
    limits = {"min_agreement": 0.9, "min_cosine": 0.8, "tolerance_abs": 5.0, "tolerance_rel": 0.0, "min_golden": 8}
    outputs = (TensorSpec("place", "FP32", (1, 2)), TensorSpec("score", "FP32", (1, 1)))
    return version("raw", outputs=outputs, acceptance=AcceptanceLimits(**(limits | changes)))


PLACES = np.array([[10, 20], [200, 40], [90, 90], [30, 250]], np.float32)
SCORES = np.array([[0.1], [0.9], [0.2], [0.8]], np.float32)


def test_outputs_of_unlike_scales_are_judged_by_tolerances_of_their_own() -> None:
    wanted, have = {"place": PLACES, "score": SCORES}, {"place": PLACES + 4, "score": 1 - SCORES}
    assert compare(have, wanted, two_scales()).figures["agreement"] == 1.0
    own = two_scales(outputs=(OutputTolerance("score", 0.05, 0.0),))
    assert compare(have, wanted, own).figures["agreement"] == 0.0
    assert compare({"place": PLACES + 4, "score": SCORES + 0.04}, wanted, own).figures["agreement"] == 1.0
    told = contract(own, device_class(), target_named("onnxruntime"))
    assert told.tolerance("score") == (0.05, 0.0)
    assert told.tolerance("place") == (5.0, 0.0)


def test_a_tolerance_that_any_answer_is_within_tells_nothing() -> None:
    wanted = {"place": PLACES, "score": SCORES}
    assert "the tolerance of output 'score' is wider than all that it answers" in vacuous(wanted, two_scales())
    assert "at most 0.8" in vacuous(wanted, two_scales())
    assert vacuous(wanted, two_scales(outputs=(OutputTolerance("score", 0.05, 0.0),))) == ""
    relative = two_scales(outputs=(OutputTolerance("score", 0.0, 20.0),))
    assert "output 'score'" in vacuous(wanted, relative)
    never_changes = {"place": PLACES, "score": np.ones((4, 1), np.float32)}
    assert vacuous(never_changes, two_scales()) == "", "a grid may be held against its tolerance"


@pytest.mark.parametrize(("by", "way"), [(1, "less"), (-1, "more")])
def test_labels_that_count_from_another_number_are_told(by: int, way: str) -> None:
    """Of a thousand classes neighbours are alike: a label beside the right one is right more often than by chance."""
    classes = np.arange(64) % 9 + 1
    scores = np.eye(11, dtype=np.float32)[classes]
    shifted = [str(c + by) if place % 4 else str(c) for place, c in enumerate(classes)]
    said = vacuous(
        {"y": scores}, version("classification", truth=tuple(shifted), outputs=(TensorSpec("y", "FP32", (1, 11)),))
    )
    assert f"answers 16 of 64 labelled samples right, and 48 if each label counts one {way}" in said
    rightly = version("classification", truth=tuple(map(str, classes)), outputs=(TensorSpec("y", "FP32", (1, 11)),))
    assert vacuous({"y": scores}, rightly) == ""


def detector(**told: Any) -> ModelVersion:
    decoding = BoxDecoding(**({"decoder": "yolov8", "threshold": 0.5, "nms_iou": 0.45, "match_iou": 0.5} | told))
    return version(
        "detection", detection=decoding, inputs=(TensorSpec("x", "FP32", (1, 3, 64, 64)),), outputs=(TensorSpec("y", "FP32", (1, 5, 8)),)
    )  # fmt: skip


def found_at(places: Any, score: float) -> dict[str, Any]:
    """Eight boxes, a quarter of the way apart."""
    centres = np.linspace(0.1, 0.9, 8) * places
    sides = np.full(8, 0.1 * places)
    return {
        "y": np.stack([centres, centres, sides, sides, np.full(8, score)])[None].repeat(4, axis=0).astype(np.float32)
    }


@pytest.mark.parametrize("above", [0.4, 0.6])
def test_a_picture_full_of_boxes_is_told_as_read_wrongly(above: float) -> None:
    scores = np.where(np.arange(400) < above * 400, 0.9, 0.1)
    places = np.linspace(4, 60, 400)
    wanted = {"y": np.stack([places, places, *np.full((2, 400), 6.0), scores])[None].astype(np.float32)}
    told = vacuous(wanted, detector())
    assert ("a box at 240 of 400 places" in told) if above > 0.5 else (told == "")


@pytest.mark.parametrize(
    ("told", "places", "score", "words"),
    [
        ({}, 64.0, 0.9, ""),
        ({"relative": True}, 1.0, 0.9, ""),
        ({"relative": True}, 64.0, 0.9, "lie outside the picture"),
        ({}, 1.0, 0.9, "in shares of the picture"),
        ({}, 64.0, 40.0, "scores up to 40, which are shares"),
        ({}, 64.0, 0.1, "finds no box"),
    ],
)
def test_boxes_that_can_not_be_meant_so_are_told(told: dict[str, Any], places: float, score: float, words: str) -> None:
    """Overlaps are the same in any unit: agreement would be high whatever came out."""
    said = vacuous(found_at(places, score), detector(**told))
    assert words in said if words else said == ""
