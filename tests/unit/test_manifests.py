from __future__ import annotations

from pathlib import Path

import pytest
from edgefleet_controller.manifests import DeviceClass, Rollout, json_schemas
from edgefleet_controller.manifests.files import load_manifests, of_kind, parse_value
from edgefleet_shared.errors import ManifestError

ROOT = Path(__file__).parents[2]

CLASS = """\
apiVersion: edgefleet/v1
kind: DeviceClass
metadata: {name: box}
spec:
  arch: x86_64
  engine: onnxruntime
  budgets:
    latency_p95_ms: 40
    memory_bytes: 1000000
"""


def load_text(folder: Path, text: str):
    (folder / "m.yaml").write_text(text)
    return load_manifests(folder)


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ManifestError) as caught:
        load_text(folder, text)
    return caught.value.message


def test_all_shipped_manifests_are_valid() -> None:
    kinds = {m.kind for m in load_manifests(ROOT / "manifests")}
    assert kinds == {"DeviceClass", "Model", "Rollout", "Site"}


def test_whole_numbers_are_accepted_where_a_real_number_is_meant(tmp_path: Path) -> None:
    (found,) = of_kind(load_text(tmp_path, CLASS), DeviceClass)
    assert found.spec.budgets.latency_p95_ms == 40.0
    assert found.file == tmp_path / "m.yaml"


@pytest.mark.parametrize(
    ("change", "line", "words"),
    [
        (("latency_p95_ms: 40", "latency_p95_ms: '40'"), 8, ["spec.budgets.latency_p95_ms", "valid number", "'40'"]),
        (
            ("  engine: onnx", "  engin: 3\n  engine: onnx"),
            6,
            ["spec.engin", "unknown field", "expected one of", "engine"],
        ),
        *(
            (
                ("  budgets:", f"  {part}: {{time_limit_s: 21601}}\n  budgets:"),
                7,
                [f"spec.{part}.time_limit_s", "21600"],
            )
            for part in ("acceptance", "build_budget")
        ),
        (("latency_p95_ms: 40", "latency_p95_ms: .inf"), 8, ["spec.budgets.latency_p95_ms", "finite number"]),
        (("arch: x86_64", "arch: sparc"), 5, ["spec.arch", "x86_64", "'sparc'"]),
        (("kind: DeviceClass", "kind: DeviceKlass"), 2, ["kind", "DeviceClass, Model, Rollout, Site", "'DeviceKlass'"]),
        (("edgefleet/v1", "edgefleet/v9"), 1, ["apiVersion", "'edgefleet/v1'"]),
        (("    memory_bytes: 1000000\n", ""), 7, ["spec.budgets.memory_bytes", "missing"]),
        (("engine: onnxruntime", "engine: onnxruntime\n  engine: tflite"), 7, ["'engine' is written twice", "line 6"]),
        (("name: box", "name: Box_1"), 3, ["metadata.name", "pattern"]),
        (("metadata: {name: box}", "metadata: {name: box"), 4, ["not valid YAML"]),
        (("arch: x86_64", "arch: &a x86_64"), 5, ["anchors and aliases are not allowed"]),
        (("arch: x86_64", "arch: !!python/name:os.system x"), 5, ["python/name"]),
        (("arch: x86_64", "arch: 2026-11-24"), 5, ["timestamp", "quotes"]),
        (("memory_bytes: 1000000", "memory_bytes: -5"), 9, ["spec.budgets.memory_bytes", "greater than 0"]),
        (("  arch: x86_64", "  arch: x86_64\n  7: x"), 6, ["a field's name must be text"]),
    ],
)
def test_a_wrong_field_is_named_with_its_line(
    tmp_path: Path, change: tuple[str, str], line: int, words: list[str]
) -> None:
    assert change[0] in CLASS
    message = refusal(tmp_path, CLASS.replace(*change, 1))
    assert f"m.yaml, line {line}:" in message
    for word in words:
        assert word in message


def test_all_wrong_fields_are_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, CLASS.replace("x86_64", "sparc").replace(": 40", ": x"))
    assert "line 5" in message
    assert "line 8" in message


def test_the_second_document_of_a_file_has_its_own_lines(tmp_path: Path) -> None:
    message = refusal(tmp_path, CLASS + "---\n" + CLASS.replace("box", "other").replace("x86_64", "sparc"))
    assert "line 15: spec.arch" in message


def test_two_manifests_of_one_name_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, CLASS + "---\n" + CLASS)
    assert "DeviceClass 'box' is already in" in message
    assert "line 13" in message


def test_nested_aliases_can_not_grow(tmp_path: Path) -> None:
    bomb = "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
    assert "anchors and aliases" in refusal(tmp_path, bomb)


@pytest.mark.parametrize(("text", "words"), [("", "no manifest in"), ("- a\n- b\n", "a manifest is a mapping")])
def test_nothing_and_no_mapping_are_refused(tmp_path: Path, text: str, words: str) -> None:
    assert words in refusal(tmp_path, text)


def test_bytes_that_are_no_text_are_refused_with_the_line(tmp_path: Path) -> None:
    (tmp_path / "m.yaml").write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(ManifestError, match="line 2: not UTF-8"):
        load_manifests(tmp_path)


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file or folder"):
        load_manifests(tmp_path / "absent")


def rollout(**spec):
    return parse_value(
        {
            "apiVersion": "edgefleet/v1",
            "kind": "Rollout",
            "metadata": {"name": "r"},
            "spec": {"model": "m", "version": "1"} | spec,
        }
    )


def test_a_rollout_has_canary_half_all_by_default() -> None:
    made = rollout()
    assert isinstance(made, Rollout)
    assert [(w.name, w.per_class, w.percent) for w in made.spec.waves] == [
        ("canary", 1, None),
        ("half", None, 50),
        ("all", None, 100),
    ]
    assert made.spec.gate.min_sample == 1


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"waves": []}, "at least 1 item"),
        ({"waves": [{"name": "a"}]}, "exactly one of per_class, count, percent, devices"),
        ({"waves": [{"name": "a", "count": 1, "percent": 5}]}, "exactly one of"),
        ({"waves": [{"name": "a", "count": 1}, {"name": "a", "count": 2}]}, "same name"),
        ({"waves": [{"name": "a", "percent": 101}]}, "less than or equal to 100"),
        ({"gate": {"min_sample": 0}}, "greater than or equal to 1"),
        ({"gate": {"max_failed_share": 1.0}}, "less than 1"),
    ],
)
def test_waves_and_gates_that_could_not_hold_are_refused(spec: dict, words: str) -> None:
    with pytest.raises(ManifestError, match=words):
        rollout(**spec)


def test_an_unknown_time_zone_is_refused() -> None:
    with pytest.raises(ManifestError, match="IANA"):
        parse_value(
            {
                "apiVersion": "edgefleet/v1",
                "kind": "Site",
                "metadata": {"name": "s"},
                "spec": {"timezone": "Mars/Olympus"},
            }
        )


def test_every_kind_has_a_json_schema_that_forbids_unknown_fields() -> None:
    schemas = json_schemas()
    assert set(schemas) == {"DeviceClass", "Model", "Rollout", "Site"}
    assert all(s["additionalProperties"] is False for s in schemas.values())


MODEL_WITH = """\
apiVersion: edgefleet/v1
kind: Model
metadata: {{name: m}}
spec:
  version: "1"
  source: {{path: n.onnx}}
  output: {output}
  calibration: {{path: c}}
  holdout: {{path: h}}
  golden: {{path: g}}
  acceptance: {acceptance}
"""


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("{kind: detection}", "output kind detection and output.detection go together"),
        ("{kind: detection, detection: {decoder: yolov3}}", "decoder yolov3 needs anchors and masks"),
        ("{kind: detection, detection: {decoder: yolov3, anchors: [[1, 2]], masks: [[1]]}}", "by their place, from 0"),
        ("{kind: detection, detection: {decoder: ssd}}", "decoder ssd and priors go together"),
        ("{kind: detection, detection: {decoder: boxes, priors: {path: p.txt}}}", "decoder ssd and priors go together"),
        ("{kind: detection, detection: {decoder: yolov8, scores: sigmoid}}", "yolov8 has no scores and no background"),
        ("{kind: text}", "output kind text and output.text go together"),
        ("{kind: raw}", "needs acceptance.tolerance_abs"),
        ("{kind: raw, segmentation: {threshold: 0.5}}", "goes with output kind segmentation"),
    ],
)
def test_an_output_contract_that_could_not_be_judged_is_refused(tmp_path: Path, output: str, words: str) -> None:
    assert words in refusal(tmp_path, MODEL_WITH.format(output=output, acceptance="{}"))


@pytest.mark.parametrize(
    ("output", "acceptance", "words"),
    [
        ("{kind: segmentation}", "{outputs: {y: {tolerance_abs: 1}}}", "a tolerance for the other outputs"),
        ("{kind: detection, detection: {decoder: end_to_end}}", "{tolerance_abs: 1}", "boxes in no fixed order"),
    ],
)
def test_a_tolerance_that_says_nothing_is_refused(tmp_path: Path, output: str, acceptance: str, words: str) -> None:
    assert words in refusal(tmp_path, MODEL_WITH.format(output=output, acceptance=acceptance))


@pytest.mark.parametrize("output", ["{kind: segmentation}", "{kind: detection, detection: {decoder: end_to_end}}"])
def test_answers_need_no_tolerance(tmp_path: Path, output: str) -> None:
    (model,) = load_text(tmp_path, MODEL_WITH.format(output=output, acceptance="{}"))
    assert model.spec.acceptance.min_agreement == 0.9
