"""Networks judged by what an application reads: boxes, lines, classes; and descriptions that would have it read something else. On real toolchains."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from edgefleet_agent import slots
from edgefleet_agent.accept import accept
from edgefleet_controller.manifests import Model
from edgefleet_shared import artifact, golden
from edgefleet_shared.contract import Verdict
from edgefleet_shared.errors import ModelError, QualityError
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import save_file
from support.compiling import Bench, class_here
from support.networks import Net, classifier, project


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def detector(folder: Path, threshold: float = 0.4) -> Model:
    """A network with a head of YOLOv3's, and its manifest."""
    net = Net(2)
    net.conv(3, 32, stride=4)
    net.add("Relu")
    net.conv(32, 14, stride=2)
    model = net.model([1, 14, 4, 4])
    detection = {"decoder": "yolov3", "anchors": [[8, 8], [16, 16]], "masks": [[0, 1]], "threshold": threshold}
    return project(folder, model, output={"kind": "detection", "detection": detection})


def test_a_detector_compiles_and_is_judged_by_its_boxes(bench: Bench) -> None:
    manifest = detector(bench.folder)
    result = bench.compile(bench.version(manifest), class_here(search={"effort": "fixed", "prefer": "size"}))
    shares = result.figures.shares
    assert shares["box_recall"].of > 20
    assert result.figures.agreement == min(shares["box_recall"].value, shares["box_precision"].value)
    config = bench.layout.config(bench.layout.manifest(result.artifact.digest))
    assert config.contract.kind == "detection"
    shutil.copytree(bench.layout.root, slots.artifacts(bench.folder / "board").root, dirs_exist_ok=True)
    report = accept(bench.folder / "board", result.artifact.digest)
    assert report.verdict is Verdict.PASSED, report.reason
    assert report.figures is not None
    assert 0.7 < report.figures.agreement < 1.0, "int8 moves some boxes"


def end_to_end(folder: Path) -> Model:
    """A detector that hands on the best 20 of its 64 boxes itself, as YOLOv10's export does, and its manifest."""
    net = Net(5)

    def part(of: str, begin: int, end: int) -> str:
        bounds = [net.constant(np.array([n], np.int64)) for n in (begin, end, 2)]
        return net.add("Slice", *bounds, first=of)

    def by_place(channels: int, outputs: int) -> str:
        net.conv(channels, outputs, 1, pads=[0, 0, 0, 0])
        net.add("Sigmoid")
        net.add("Reshape", net.constant(np.array([1, outputs, 64], np.int64)))
        return net.add("Transpose", perm=[0, 2, 1])

    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 32, stride=2)
    trunk = net.add("Relu")
    by_place(32, 4)
    sides = net.add("Mul", net.constant(np.array(3, np.float32)))
    y, x = np.mgrid[:8, :8]
    centres = net.constant(np.stack([x.ravel() * 4 + 2, y.ravel() * 4 + 2], axis=1)[None].astype(np.float32))
    first = net.add("Sub", part(sides, 0, 2), first=centres)
    last = net.add("Add", part(sides, 2, 4), first=centres)
    boxes = net.add("Concat", last, first=first, axis=2)
    net.last = trunk
    scores = by_place(32, 3)
    best = net.add("ReduceMax", first=scores, axes=[2], keepdims=0)
    net.add("ArgMax", first=scores, axis=2, keepdims=1)
    kinds = net.add("Cast", to=TensorProto.FLOAT)
    count = net.constant(np.array([20], np.int64))
    net.nodes.append(helper.make_node("TopK", [best, count], ["values", "places"], name="top", axis=1))
    end = net.constant(np.array([2], np.int64))
    values, places = (net.add("Unsqueeze", end, first=name) for name in ("values", "places"))
    four = net.add("Expand", net.constant(np.array([1, 20, 4], np.int64)), first=places)
    rows = net.add("GatherElements", four, first=boxes, axis=1)
    classes = net.add("GatherElements", places, first=kinds, axis=1)
    net.add("Concat", values, classes, first=rows, axis=2)
    told = {"decoder": "end_to_end", "threshold": 0.5}
    return project(folder, net.model([1, 20, 6]), output={"kind": "detection", "detection": told})


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_a_detector_that_drops_boxes_itself_is_judged_by_those_it_hands_on(bench: Bench, engine: str) -> None:
    manifest = end_to_end(bench.folder)
    wanted = class_here(engine, search={"effort": "fixed", "prefer": "size"}, accuracy={"min_agreement": 0.9})
    result = bench.compile(bench.version(manifest), wanted)
    assert result.precision == "int8"
    assert result.figures.shares["box_recall"].of > 300
    shutil.copytree(bench.layout.root, slots.artifacts(bench.folder / "board").root, dirs_exist_ok=True)
    report = accept(bench.folder / "board", result.artifact.digest)
    assert report.verdict is Verdict.PASSED, report.reason


def test_golden_pictures_that_are_all_but_one_are_cautioned_of_and_others_are_not(bench: Bench) -> None:
    manifest = project(bench.folder, classifier())
    first, *others = sorted((bench.folder / "golden").iterdir())
    shown, chance = np.asarray(Image.open(first)), np.random.default_rng(0)
    for other in others:
        noisy = np.clip(shown + chance.normal(0, 2, shown.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(other)
    result = bench.compile(bench.version(manifest), class_here(search={"effort": "fixed", "prefer": "size"}))
    (told,) = result.cautions
    assert told.startswith("golden samples: ")
    assert "8 pictures are 1 but for noise" in told
    written = json.loads(bench.layout.read(result.report, 10**7))
    assert written["cautions"] == [told]
    assert told in bench.layout.read(result.page, 10**7).decode()


def test_golden_pictures_with_nothing_to_find_are_refused(bench: Bench) -> None:
    manifest = detector(bench.folder, threshold=0.5)
    for number, file in enumerate((bench.folder / "golden").iterdir()):
        picture = Image.new("RGB", (32, 32), (128, 128, 128))  # a grey that the network takes for nothing
        picture.paste((136, 128, 128), (10, 10, 12 + number, 12))
        picture.save(file)
    with pytest.raises(QualityError, match="finds no box in any of the 8 golden samples"):
        bench.compile(bench.version(manifest), class_here(search={"effort": "fixed", "prefer": "size"}))


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_a_head_that_joins_pixels_and_scores_is_won_back_where_it_joins_them(bench: Bench, engine: str) -> None:
    """YOLOv8's: in int8 a step of the joined output is larger than any score, and beside the pixels that is hardly noise."""
    net = Net(5)
    net.conv(3, 32, stride=4)
    trunk = net.add("Relu")
    net.conv(32, 4, stride=2)
    net.add("Sigmoid")
    boxes = net.add("Mul", net.constant(np.array(320, np.float32)))
    net.last = trunk
    net.conv(32, 2, stride=2)
    scores = net.add("Sigmoid")
    net.add("Concat", scores, first=boxes, axis=1)
    net.add("Reshape", net.constant(np.array([1, 6, 16], np.int64)))
    told = {"decoder": "yolov8", "threshold": 0.6, "nms_iou": 0.9}
    manifest = project(
        bench.folder,
        net.model([1, 6, 16]),
        output={"kind": "detection", "detection": told},
        acceptance={"tolerance_abs": 9.0},
    )
    wanted = class_here(engine, search={"effort": "full", "prefer": "size"}, accuracy={"min_agreement": 0.9})
    result = bench.compile(bench.version(manifest), wanted)
    report = json.loads(bench.layout.read(result.report, 10**7))
    assert result.figures.sqnr_db_by_output.keys() == {"scores, boxes", "scores, scores"}
    good = [c["figures"] for c in report["candidates"] if c["recipe"]["precision"] == "int8" and not c["misses"]]
    assert max(f["sqnr_db_by_output"]["scores, scores"] for f in good) > 20
    if engine == "tflite":  # which rounds its outputs too
        plain = report["candidates"][0]["figures"]
        assert plain["sqnr_db_by_output"]["scores, scores"] < 10 < plain["sqnr_db_by_output"]["scores, boxes"]


@pytest.mark.parametrize("engine", ["onnxruntime", "tflite", "openvino"])
def test_a_recogniser_whose_answers_put_their_steps_first_is_judged_line_by_line(bench: Bench, engine: str) -> None:
    """Steps x batch x classes, as PyTorch's recurrent networks have it: the first axis is no batch."""
    net = Net(3)
    net.conv(3, 16, stride=4)
    net.add("Relu")
    net.conv(16, 5, stride=2)
    net.add("Reshape", net.constant(np.array([1, 5, 16], np.int64)))
    net.add("Transpose", perm=[2, 0, 1])
    (bench.folder / "characters.txt").write_text("a\nb\nc\n")
    manifest = project(
        bench.folder, net.model([16, 1, 5]),
        output={"kind": "text", "text": {"characters": "characters.txt"}}, acceptance={"tolerance_abs": 0.5},
    )  # fmt: skip
    version = bench.version(manifest)
    result = bench.compile(
        version, class_here(engine, search={"effort": "fixed", "prefer": "size"}, accuracy={"min_agreement": 0.3})
    )
    assert result.figures.samples == version.holdout.count
    content = bench.layout.read(
        bench.layout.manifest(result.artifact.digest).layer(artifact.GOLDEN_LAYER).digest, 10**8
    )
    _, references = golden.unpack(content, version.encoding)
    assert references["scores"].shape == (version.golden.count, 16, 1, 5)


def by_colour(folder: Path, trained: dict[str, Any], declared: dict[str, Any]) -> Model:
    """A network that says which of three colours a picture has, how bright it is taken into account, and labelled pictures; ``trained`` is
    how it takes its input, ``declared`` how the manifest says."""
    scale = {"mean": 0.0, "std": 255.0} | {k: v for k, v in trained.items() if k in ("mean", "std")}
    net = Net()
    net.add("GlobalAveragePool")
    net.add("Flatten")
    # Red, green, blue, in the order in which they come; and a fourth class for dark pictures.
    colours = [[3, -1, -1], [-1, 3, -1], [-1, -1, 3]]
    rows = np.array(
        [*(row[::-1] if trained.get("colour") == "BGR" else row for row in colours), [-3, -3, -3]], np.float32
    )
    # What the network sees of grey level g is (g - mean) / std: taken back here, so that it judges g / 255.
    weight = rows * np.float32(scale["std"] / 255)
    bias = rows.sum(axis=1) * np.float32(scale["mean"] / 255) + np.array([0, 0, 0, 2.2], np.float32)
    net.add("Gemm", net.constant(weight), net.constant(bias.astype(np.float32)), transB=1)
    manifest = project(folder, net.model([1, 4]), counts=(8, 8, 8), inputs=[{"name": "image", **declared}])
    chance, truth = np.random.default_rng(0), []
    pictures = chance.integers(0, 40, (80, 32, 32, 3))
    for number, picture in enumerate(pictures):
        truth.append(number % 4)
        if number % 4 < 3:
            picture[..., number % 4] += int(chance.integers(120, 200))
    save_file({"image": pictures.astype(np.uint8)}, folder / "holdout.safetensors")
    (folder / "truth.txt").write_text("\n".join(map(str, truth)))
    fields = manifest.spec.model_dump() | {"holdout": {"path": "holdout.safetensors", "truth": "truth.txt"}}
    return Model.model_validate({"kind": "Model", "metadata": {"name": "net"}, "spec": fields})


SCALED = {"std": [255.0]}


@pytest.mark.parametrize(
    ("trained", "declared", "words"),
    [
        (
            {"colour": "BGR"},
            SCALED,
            r"answers \d+ of 64 .* as the manifest describes its input, and 64 with colour BGR",
        ),
        ({}, {"colour": "BGR", **SCALED}, r"and 64 with colour RGB"),
        ({}, {"mean": [127.5], "std": [127.5]}, r"and 64 with x / 255"),
        ({"mean": 127.5, "std": 127.5}, SCALED, r"and 64 with \(x - 127\.5\) / 127\.5"),
        ({"colour": "BGR", "mean": 127.5, "std": 127.5}, SCALED, r"and 64 with colour BGR and \(x - 127\.5\) / 127\.5"),
    ],
)
def test_an_input_described_otherwise_than_the_network_takes_it_is_told_with_what_would_be_right(
    bench: Bench, trained: dict[str, Any], declared: dict[str, Any], words: str
) -> None:
    version = bench.version(by_colour(bench.folder, trained, declared))
    with pytest.raises(QualityError, match=words):
        bench.compile(version, class_here(precision="fp32"))


def test_an_input_described_rightly_is_not_suspected(bench: Bench) -> None:
    version = bench.version(by_colour(bench.folder, {"colour": "BGR"}, {"colour": "BGR", **SCALED}))
    assert bench.compile(version, class_here(precision="fp32")).quality == "passed"


def test_a_network_that_answers_at_random_is_told_as_that(bench: Bench) -> None:
    net = Net(11)
    exact = net.conv(3, 8, stride=4)
    net.add("RandomNormalLike", scale=0.01)
    net.add("Add", exact)
    net.add("AveragePool", kernel_shape=[8, 8])
    net.add("Flatten")
    net.dense(8, 10)
    version = bench.version(project(bench.folder, net.model([1, 10])))
    with pytest.raises(
        ModelError, match=r"in two ways: it draws random numbers \(operator RandomNormalLike, node 'n1'\)"
    ):
        bench.compile(version, class_here(precision="fp32"))


def test_what_boards_would_refuse_over_the_golden_samples_is_not_shipped(bench: Bench) -> None:
    """Classes of pixels are what an application sees; a board compares values, here within less than int8 can hold."""
    net = Net(10)
    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 4)
    tight = {"output": {"kind": "segmentation"}, "acceptance": {"tolerance_abs": 1e-4}}
    model = net.model([1, 4, 16, 16])
    version = bench.version(project(bench.folder, model, **tight))
    fixed = class_here(search={"effort": "fixed", "prefer": "size"})
    with pytest.raises(QualityError, match=r"boards would refuse it: 0\.\d+ of 8 golden samples' values"):
        bench.compile(version, fixed)
    forced = bench.compile(version, fixed, ship_despite_quality=True)
    assert forced.quality == "forced"
    assert "boards would refuse it" in forced.misses[0]
    more = bench.compile(version, class_here(search={"effort": "quick", "prefer": "size"}))
    assert (more.quality, more.precision) == ("passed", "fp32")
    roomy = {"output": {"kind": "segmentation"}, "acceptance": {"tolerance_abs": 0.5}}
    shipped = bench.compile(bench.version(project(bench.folder, model, **roomy)), fixed)
    assert (shipped.quality, shipped.precision) == ("passed", "int8")


def test_a_quick_search_leaves_layers_in_float_where_boards_would_refuse_the_plain_recipe(bench: Bench) -> None:
    net = Net(10)
    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 32)
    net.add("Relu")
    net.conv(32, 4)
    within = {"output": {"kind": "segmentation"}, "acceptance": {"tolerance_abs": 0.018}}
    version = bench.version(project(bench.folder, net.model([1, 4, 16, 16]), **within))
    result = bench.compile(version, class_here(search={"effort": "quick", "prefer": "size"}))
    assert "boards would refuse it: 0.7" in result.why
    assert (result.quality, result.precision) == ("passed", "int8")
    assert "nodes in float" in result.recipe
    told = json.loads(bench.layout.read(result.report, 10**7))
    assert told["layers"], "the report has what it looked at"


def test_half_precision_is_tried_where_int8_falls_only_over_the_golden_samples(bench: Bench) -> None:
    net = Net(10)
    net.conv(3, 32, stride=2)
    net.add("Relu")
    net.conv(32, 4)
    exact = {"output": {"kind": "segmentation"}, "acceptance": {"tolerance_abs": 0.02, "min_agreement": 0.98}}
    version = bench.version(project(bench.folder, net.model([1, 4, 16, 16]), **exact))
    quick = class_here(
        search={"effort": "quick", "prefer": "size"}, budgets={"latency_p95_ms": 1e4, "memory_bytes": 1 << 30}
    )
    result = bench.compile(version, quick)
    assert "boards would refuse it" in result.why
    assert (result.quality, result.precision) == ("passed", "fp16")
    assert result.figures.compiled_bytes < 0.6 * result.figures.float_bytes
