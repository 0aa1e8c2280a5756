from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.manifests import Model
from edgefleet_controller.source import ModelVersion, decode, import_model
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import DataError, ModelError
from onnx import TensorProto, helper
from PIL import Image
from safetensors.numpy import load_file, save_file
from support.networks import SIDE, Net, classifier, project, write_pictures


def run(folder: Path, manifest: Model) -> ModelVersion:
    return import_model(manifest, folder, Layout(folder / "layout"), cache=folder / "cache")


def imported(folder: Path, model: onnx.ModelProto, **spec: Any) -> ModelVersion:
    return run(folder, project(folder, model, **spec))


def test_a_version_is_stored_whole_and_the_same_input_gives_the_same_digest(tmp_path: Path) -> None:
    first = imported(tmp_path, classifier())
    again = imported(tmp_path, classifier())
    layout = Layout(tmp_path / "layout")
    assert first.digest == again.digest
    assert decode(layout.read(first.digest, 10**6)) == first
    pictures = load_file(layout.path(first.holdout.digest))["image"]
    assert pictures.shape == (32, SIDE, SIDE, 3)
    assert pictures.dtype == np.uint8
    assert (first.inputs[0].name, first.inputs[0].shape) == ("image", (1, 3, SIDE, SIDE))
    assert (first.outputs[0].name, first.outputs[0].shape) == ("scores", (1, 10))


def test_another_picture_gives_another_version(tmp_path: Path) -> None:
    first = imported(tmp_path, classifier())
    manifest = project(tmp_path, classifier())
    Image.effect_noise((48, 40), 90).convert("RGB").save(tmp_path / "golden" / "p000.png")
    assert run(tmp_path, manifest).digest != first.digest


@pytest.mark.parametrize("content", [b"", b"no network at all", b"\x89PNG\r\n\x1a\n", b"\x08\x08"])
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    manifest = project(tmp_path, classifier())
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX model"):
        run(tmp_path, manifest)


def test_a_missing_network_is_named(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier())
    (tmp_path / "net.onnx").unlink()
    with pytest.raises(ModelError, match=r"can't read .*net\.onnx"):
        run(tmp_path, manifest)


def test_an_invalid_graph_is_refused(tmp_path: Path) -> None:
    model = classifier()
    model.graph.node[3].input[0] = "nowhere"
    with pytest.raises(ModelError, match="not valid ONNX"):
        imported(tmp_path, model)


def external(tensor: onnx.TensorProto) -> None:
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../etc/passwd")


def hide_in_initializer(model: onnx.ModelProto) -> None:
    external(model.graph.initializer[0])


def hide_in_attribute(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["k"], value=helper.make_tensor("k", TensorProto.FLOAT, [1], [1.0]))
    external(node.attribute[0].t)
    model.graph.node.insert(0, node)


def hide_in_subgraph(model: onnx.ModelProto) -> None:
    inner = helper.make_graph([], "g", [], [], [helper.make_tensor("w", TensorProto.FLOAT, [1], [1.0])])
    external(inner.initializer[0])
    node = helper.make_node("If", ["cond"], ["o"])
    node.attribute.append(helper.make_attribute("then_branch", inner))
    model.graph.node.append(node)


def hide_in_sparse(model: onnx.ModelProto) -> None:
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]))
    external(sparse.values)


def hide_in_function(model: onnx.ModelProto) -> None:
    node = helper.make_node("Constant", [], ["k"], value=helper.make_tensor("k", TensorProto.FLOAT, [1], [1.0]))
    external(node.attribute[0].t)
    model.functions.append(helper.make_function("local", "F", [], ["k"], [node], [helper.make_opsetid("", 13)]))


@pytest.mark.parametrize(
    "hide", [hide_in_initializer, hide_in_attribute, hide_in_subgraph, hide_in_sparse, hide_in_function]
)
def test_external_data_is_refused_wherever_it_hides(tmp_path: Path, hide: Any) -> None:
    model = classifier()
    hide(model)
    with pytest.raises(ModelError, match="in another file"):
        imported(tmp_path, model)


def test_an_open_dimension_without_a_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"dimension 'frames' \(axis 0 of input 'image'\) has no fixed size"):
        imported(tmp_path, classifier(batch="frames"))


def test_an_open_dimension_takes_the_given_size(tmp_path: Path) -> None:
    version = imported(tmp_path, classifier(batch="frames"), sizes={"frames": 1})
    assert version.inputs[0].shape == (1, 3, SIDE, SIDE)
    assert version.outputs[0].shape == (1, 10)


def test_a_size_for_a_dimension_that_is_not_open_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no open dimension 'heigth'"):
        imported(tmp_path, classifier(), sizes={"heigth": 32})


def test_a_fixed_batch_other_than_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="must be a batch of 1"):
        imported(tmp_path, classifier(batch="n"), sizes={"n": 4})


def test_an_input_name_that_the_network_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has the inputs image; the manifest names 'picture'"):
        imported(tmp_path, classifier(), inputs=[{"name": "picture"}])


def test_a_layout_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not NHWC with 3 channels"):
        imported(tmp_path, classifier(), inputs=[{"name": "image", "layout": "NHWC"}])


def test_a_classifier_needs_one_output_of_classes(tmp_path: Path) -> None:
    net = Net()
    net.add("ReduceMean", axes=[0, 1, 2, 3], keepdims=0)
    with pytest.raises(ModelError, match="a classifier has one, batch x classes"):
        imported(tmp_path, net.model([]))


def test_labels_must_be_as_many_as_classes(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier(), output={"labels": "labels.txt"})
    (tmp_path / "labels.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"has 2 labels, .* has 10 classes"):
        run(tmp_path, manifest)


def spoil_missing(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def spoil_unreadable(folder: Path) -> None:
    (folder / "p003.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")


def spoil_cut(folder: Path) -> None:
    file = folder / "p003.png"
    file.write_bytes(file.read_bytes()[:-40])


def spoil_small(folder: Path) -> None:
    Image.new("RGB", (20, 48), (1, 2, 3)).save(folder / "p003.png")


def spoil_blank(folder: Path) -> None:
    Image.new("RGB", (48, 48), (7, 7, 7)).save(folder / "p003.png")


def spoil_few(folder: Path) -> None:
    for file in sorted(folder.iterdir())[3:]:
        file.unlink()


def spoil_alike(folder: Path) -> None:
    content = (folder / "p000.png").read_bytes()
    for file in folder.iterdir():
        file.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_missing, "calibration: no folder"),
        (spoil_unreadable, r"calibration: can't read the picture .*p003\.png"),
        (spoil_cut, r"calibration: can't read the picture .*p003\.png"),
        (spoil_small, r"p003\.png has 20 x 48 pixels, the network takes 32 x 32"),
        (spoil_blank, r"p003\.png is blank: every pixel is 7"),
        (spoil_few, "has 3 pictures, 8 are needed"),
        (spoil_alike, "all 16 samples in .* are the same"),
    ],
)
def test_calibration_pictures_that_mean_nothing_are_refused(tmp_path: Path, spoil: Any, words: str) -> None:
    manifest = project(tmp_path, classifier())
    spoil(tmp_path / "calibration")
    with pytest.raises(DataError, match=words):
        run(tmp_path, manifest)


def test_more_pictures_wanted_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holdout: .* has 32 pictures, 100 are needed"):
        imported(tmp_path, classifier(), holdout={"path": "holdout", "count": 100})


def test_a_picture_in_two_splits_is_refused(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier())
    (tmp_path / "holdout" / "p001.png").write_bytes((tmp_path / "calibration" / "p005.png").read_bytes())
    with pytest.raises(DataError, match=r"p001\.png \(holdout\) is the same picture as p005\.png \(calibration\)"):
        run(tmp_path, manifest)


def test_pictures_are_cropped_around_their_centre(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier(), inputs=[{"name": "image", "resize": SIDE}])
    array = np.zeros((SIDE, 3 * SIDE, 3), np.uint8)
    array[:, SIDE : SIDE + 16] = 200  # left half of the centre
    Image.fromarray(array).save(tmp_path / "golden" / "p000.png")
    version = run(tmp_path, manifest)
    stored = load_file(Layout(tmp_path / "layout").path(version.golden.digest))["image"][0]
    assert stored[:, :14].min() == 200
    assert stored[:, 18:].max() == 0


def tensors(folder: Path, array: Any, name: str = "image") -> None:
    save_file({name: array}, folder / "c.safetensors")


GOOD = np.random.default_rng(0).normal(size=(16, 3, SIDE, SIDE)).astype(np.float32)


def test_encoded_tensors_may_calibrate(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier(), calibration={"path": "c.safetensors"})
    tensors(tmp_path, GOOD)
    version = run(tmp_path, manifest)
    stored = load_file(Layout(tmp_path / "layout").path(version.calibration.digest))["image"]
    assert stored.dtype == np.float32
    assert np.array_equal(stored, GOOD)


@pytest.mark.parametrize(
    ("array", "name", "words"),
    [
        (GOOD[:, :, :16], "image", r"expected N x 3 x 32 x 32"),
        (GOOD.astype(np.float64), "image", "is float64, expected float32"),
        (GOOD, "picture", "holds picture; the network's inputs are image"),
        (GOOD[:3], "image", "has 3 samples, 8 are needed"),
        (np.where(GOOD > 3, np.nan, GOOD), "image", "not finite"),
        (np.ones_like(GOOD), "image", "is constant"),
    ],
)
def test_encoded_tensors_that_mean_nothing_are_refused(tmp_path: Path, array: Any, name: str, words: str) -> None:
    manifest = project(tmp_path, classifier(), calibration={"path": "c.safetensors"})
    tensors(tmp_path, array, name)
    with pytest.raises(DataError, match=words):
        run(tmp_path, manifest)


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier(), calibration={"path": "c.safetensors"})
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DataError, match="not a safetensors file"):
        run(tmp_path, manifest)


def test_a_folder_of_pictures_needs_a_picture_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="describes no picture input"):
        imported(tmp_path, classifier(), inputs=[])


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = project(tmp_path, classifier())
    write_pictures(tmp_path / "calibration", 1, 9, size=(300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(DataError, match=r"can't read the picture .*p000\.png"):
        run(tmp_path, manifest)


@pytest.mark.parametrize(
    ("fit", "grey", "coloured"),
    [
        ("letterbox", [(0, 16), (31, 16)], [(16, 0), (16, 31)]),
        ("left", [(20, 0), (31, 31)], [(2, 16), (10, 31)]),
        ("stretch", [], [(0, 0), (31, 31), (16, 16)]),
    ],
)
def test_pictures_fit_as_the_manifest_says(tmp_path: Path, fit: str, grey: Any, coloured: Any) -> None:
    manifest = project(tmp_path, classifier(), inputs=[{"name": "image", "fit": fit, "fill": 7}])
    for split in ("calibration", "holdout", "golden"):
        for number, file in enumerate(sorted((tmp_path / split).iterdir())):
            Image.new("RGB", (80, 40), (200, number, 20 * len(split))).save(file)
    version = run(tmp_path, manifest)
    (array,) = load_file(Layout(tmp_path / "layout").path(version.golden.digest)).values()
    for row, column in grey:
        assert array[0, row, column].tolist() == [7, 7, 7]
    for row, column in coloured:
        assert abs(int(array[0, row, column, 0]) - 200) < 20


def yolo_like() -> onnx.ModelProto:
    net = Net()
    net.conv(3, 7, stride=8)
    return net.model([1, 7, 4, 4])


DETECTION = {
    "output": {"kind": "detection", "detection": {"decoder": "yolov3", "anchors": [[16, 8]], "masks": [[0]]}},
    "acceptance": {"tolerance_abs": 0.5},
}


def test_a_detectors_decoding_travels_with_the_version(tmp_path: Path) -> None:
    version = imported(tmp_path, yolo_like(), **DETECTION)
    assert version.detection is not None
    assert version.detection.anchors == ((16.0, 8.0),)
    assert decode(version.encode()) == version


def test_a_head_that_does_not_hold_its_anchors_is_refused(tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 9, stride=8)
    told = {"decoder": "yolov3", "anchors": [[16, 8], [8, 8]], "masks": [[0, 1]]}
    with pytest.raises(ModelError, match="does not hold 2 anchors"):
        imported(tmp_path, net.model([1, 9, 4, 4]), **DETECTION | {"output": {"kind": "detection", "detection": told}})


def test_truth_names_classes_by_label_or_number_and_each_line_is_checked(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\n".join("abcdefghij"))
    (tmp_path / "truth.txt").write_text("\n".join(["a", "9"] * 16))
    more = {
        "output": {"kind": "classification", "labels": "labels.txt"},
        "holdout": {"path": "holdout", "truth": "truth.txt"},
    }
    assert imported(tmp_path, classifier(), **more).truth[:2] == ("0", "9")
    for text, words in (("\n".join(["a"] * 31), "31 lines"), ("\n".join(["10"] * 32), "line 1: '10' is no label")):
        (tmp_path / "truth.txt").write_text(text)
        with pytest.raises(DataError, match=words):
            imported(tmp_path, classifier(), **more)


def test_characters_must_fit_the_outputs_classes(tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 4, stride=8)
    net.add("Reshape", net.constant(np.array([1, 4, 16], np.int64)))
    net.add("Transpose", perm=[0, 2, 1])
    model = net.model([1, 16, 4])
    (tmp_path / "characters.txt").write_text("a\nb\n")
    text = {"output": {"kind": "text", "text": {"characters": "characters.txt"}}, "acceptance": {"tolerance_abs": 0.1}}
    assert imported(tmp_path, model, **text).characters == ("a", "b", " ")
    (tmp_path / "characters.txt").write_text("a\n")
    with pytest.raises(DataError, match="has 2 characters, space included"):
        imported(tmp_path, model, **text)
