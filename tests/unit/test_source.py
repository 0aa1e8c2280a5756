"""Source networks and what goes with them: labels, layouts, decoders, plans; and what is refused."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from edgefleet_controller.manifests import Model, Pruning
from edgefleet_controller.model_version import ModelVersion, blobs, decode
from edgefleet_controller.source.converters import original_of
from edgefleet_controller.source.formats import format_of
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import DataError, ModelError
from onnx import TensorProto, helper
from PIL import Image
from pydantic import ValidationError
from safetensors.numpy import load_file
from support.networks import SIDE, Net, classifier, project, project_of_numbers, resize_input, write_pictures


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


@pytest.mark.parametrize("content", [b"no network at all", b"\x89PNG\r\n\x1a\n", b"\x08\x08"])
def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path, content: bytes) -> None:
    manifest = project(tmp_path, classifier())
    (tmp_path / "net.onnx").write_bytes(content)
    with pytest.raises(ModelError, match="not an ONNX model"):
        run(tmp_path, manifest)


def test_a_file_with_nothing_in_it_and_what_is_no_file_are_told_as_that(tmp_path: Path) -> None:
    """As a download that came to nothing leaves it; a pipe would be waited for."""
    (tmp_path / "empty.tflite").touch()
    os.mkfifo(tmp_path / "pipe.onnx")
    for name, told in (("empty.tflite", "empty.tflite is empty"), ("pipe.onnx", "pipe.onnx is no file")):
        with pytest.raises(ModelError, match=told):
            format_of(tmp_path / name)


def test_a_missing_network_is_named(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier())
    (tmp_path / "net.onnx").unlink()
    with pytest.raises(ModelError, match=r"can't read .*net\.onnx"):
        run(tmp_path, manifest)


def test_nodes_in_another_order_than_they_run_in_are_put_in_that(tmp_path: Path) -> None:
    """As converters to half precision leave them, which put casts at the end; engines don't mind."""
    ordered, turned = classifier(), classifier()
    del turned.graph.node[:]
    turned.graph.node.extend(reversed(ordered.graph.node))
    version = imported(tmp_path, turned)
    assert version.network == imported(tmp_path, ordered).network


def test_nodes_that_wait_for_each_other_are_refused(tmp_path: Path) -> None:
    model = classifier()
    model.graph.node[0].input[0] = model.graph.node[1].output[0]
    with pytest.raises(ModelError, match="not valid ONNX"):
        imported(tmp_path, model)


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
    with pytest.raises(ModelError, match="in another file") as caught:
        imported(tmp_path, model)
    assert "torch.onnx.export(..., external_data=False)" in caught.value.hint  # torch's default is True


def test_weights_that_no_one_file_can_hold_are_told_as_too_many(tmp_path: Path) -> None:
    """Advice to save them in one file would end in protobuf's own error."""
    model = classifier()
    weight = model.graph.initializer[0]
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.dims[:] = [24_000, 24_000]
    weight.external_data.add(key="location", value="weights.bin")
    with pytest.raises(ModelError, match=r"2\.3 GB of weights.* one ONNX file holds 2\.1 GB") as caught:
        imported(tmp_path, model)
    assert "one file" not in caught.value.hint


def test_a_file_that_is_larger_than_onnx_can_be_is_told_with_its_size(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier())
    with (tmp_path / "net.onnx").open("wb") as stream:
        stream.truncate(2_300_000_000)
    with pytest.raises(ModelError, match=r"net.onnx is larger than an ONNX file can be: 2\.3 GB, at most 2\.1"):
        import_model(manifest, tmp_path, Layout(tmp_path / "layout"), cache=tmp_path / "cache")


@pytest.mark.parametrize(("opset", "told"), [(5, "at least 7"), (99, "no tool here knows")])
def test_an_operator_set_that_is_too_old_or_of_the_future_is_told(tmp_path: Path, opset: int, told: str) -> None:
    model = classifier()
    model.opset_import[0].version = opset
    with pytest.raises(ModelError, match=rf"operator set {opset}.*{told}"):
        imported(tmp_path, model)


def test_an_output_that_is_an_input_is_refused(tmp_path: Path) -> None:
    model = classifier()
    model.graph.output.append(model.graph.input[0])
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 0.1}}
    with pytest.raises(ModelError, match="the output 'image' is an input"):
        imported(tmp_path, model, **raw)


@pytest.mark.parametrize("typed", [False, True], ids=["a name alone", "a type without a shape"])
def test_an_output_of_which_only_the_name_stands_there_gets_its_shape(tmp_path: Path, typed: bool) -> None:
    """As who asks for a value inside a network writes it; engines take it so."""
    model = classifier(batch="frames")
    inside = model.graph.output.add(name="n5")
    if typed:
        inside.type.tensor_type.elem_type = TensorProto.FLOAT
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 0.1}}
    version = imported(tmp_path, model, sizes={"frames": 1}, **raw)
    assert [(o.name, o.datatype, o.shape) for o in version.outputs] == [
        ("scores", "FP32", (1, 10)), ("n5", "FP32", (1, 16, 16, 16)),
    ]  # fmt: skip


def test_a_spectrum_that_does_not_say_how_many_of_its_sides_it_has_is_taken(tmp_path: Path) -> None:
    """One side is the default, as engines have it."""
    net = Net()
    net.add("STFT", net.constant(np.array(64)), net.constant(np.hanning(128).astype(np.float32)))
    net.add("ReduceSumSquare", axes=[3], keepdims=0)
    net.add("MatMul", net.constant(net.rng.normal(size=(65, 6)).astype(np.float32)))
    model = net.model([1, 7, 6], opset=17)
    resize_input(model, 1, 512)
    version = run(tmp_path, project_of_numbers(tmp_path, model))
    assert version.outputs[0].shape == (1, 7, 6)


def test_an_output_of_which_nothing_tells_the_shape_is_named(tmp_path: Path) -> None:
    model = classifier()
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.append(helper.make_node("Mystery", ["n5"], ["riddle"], domain="own"))
    model.graph.output.add(name="riddle")
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 0.1}}
    with pytest.raises(ModelError, match=r"nothing tells type and shape of the output 'riddle'"):
        imported(tmp_path, model, **raw)


def test_outputs_that_can_not_be_served_are_told_as_what_they_are(tmp_path: Path) -> None:
    raw = {"output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 0.1}}
    model = classifier()
    model.graph.node.append(helper.make_node("SequenceConstruct", ["scores"], ["listed"]))
    model.graph.output.append(helper.make_tensor_sequence_value_info("listed", TensorProto.FLOAT, None))
    with pytest.raises(ModelError, match="'listed' is a sequence, which can't be served"):
        imported(tmp_path, model, **raw)
    model = classifier()
    model.graph.node.append(helper.make_node("Cast", ["scores"], ["brief"], to=TensorProto.BFLOAT16))
    model.graph.output.append(helper.make_tensor_value_info("brief", TensorProto.BFLOAT16, [1, 10]))
    with pytest.raises(ModelError, match="'brief' is a tensor of bfloat16, which can't be served"):
        imported(tmp_path, model, **raw)


def test_an_input_whose_batch_lies_elsewhere_is_told_what_to_do(tmp_path: Path) -> None:
    model = classifier()
    model.graph.input.append(helper.make_tensor_value_info("state", TensorProto.FLOAT, [2, 1, 64]))
    with pytest.raises(ModelError, match=r"input 'state' has shape \(2, 1, 64\)") as caught:
        imported(tmp_path, model)
    assert "a recurrent network's state, wants a Transpose" in caught.value.hint


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


def pruned(folder: Path, **prune: Any) -> Model:
    return project(folder, classifier(), counts=(70, 32, 8), prune={"structured": 0.5, **prune})


def test_a_version_to_prune_keeps_its_plan_and_its_training_samples(tmp_path: Path) -> None:
    write_pictures(tmp_path / "training", 80, 7)
    (tmp_path / "labels.txt").write_text("\n".join(str(i % 10) for i in range(80)))
    version = run(tmp_path, pruned(tmp_path, training={"path": "training", "truth": "labels.txt"}))
    assert version.pruning is not None
    assert (version.pruning.structured, version.pruning.steps) == (0.5, 4)
    assert version.training is not None
    assert version.training.count == len(version.training_truth) == 80
    assert version.training.digest in blobs(version)
    assert run(tmp_path, pruned(tmp_path)).training is None


def test_pruning_of_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="give structured or unstructured"):
        Pruning.model_validate({"epochs": 3})


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "bare pickle"])
def test_a_pytorch_file_is_told_how_to_be_exported(tmp_path: Path, archive: bool) -> None:
    manifest = project(tmp_path, classifier(), source={"path": "net.pth"})
    if archive:
        with zipfile.ZipFile(tmp_path / "net.pth", "w") as made:
            made.writestr("net/data.pkl", b"cos\nsystem\n")
    else:
        (tmp_path / "net.pth").write_bytes(b"\x80\x02cos\nsystem\n")
    with pytest.raises(ModelError, match=r"is a PyTorch file.*torch\.onnx\.export"):
        run(tmp_path, manifest)


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
    with pytest.raises(ModelError, match="here 2 anchors"):
        imported(tmp_path, net.model([1, 9, 4, 4]), **DETECTION | {"output": {"kind": "detection", "detection": told}})


def ssd_like() -> onnx.ModelProto:
    """Scores, then boxes: 16 x 2 and 16 x 4."""
    net = Net()
    net.conv(3, 6, stride=8)
    net.add("Transpose", perm=[0, 2, 3, 1])
    rows = net.add("Reshape", net.constant(np.array([1, 16, 6])))
    for name, begin, end in (("confidence", 0, 2), ("location", 2, 6)):
        bounds = [net.constant(np.array([place])) for place in (begin, end, 2)]
        net.add("Slice", *bounds, first=rows)
        net.nodes[-1].output[:] = [name]
    model = net.model([1, 16, 4])
    del model.graph.node[-1]
    infos = [onnx.helper.make_tensor_value_info(n, 1, [1, 16, w]) for n, w in (("confidence", 2), ("location", 4))]
    del model.graph.output[:]
    model.graph.output.extend(infos)
    return model


SSD = {"decoder": "ssd", "scores": "softmax", "background": 0, "priors": {"path": "priors.txt"}}
SSD_LIKE = {"output": {"kind": "detection", "detection": SSD}, "acceptance": {"tolerance_abs": 0.5}}


def test_an_ssds_priors_travel_with_the_version(tmp_path: Path) -> None:
    (tmp_path / "priors.txt").write_text("0.5, 0.25, 0.1 0.2\n\n" + "0.1 0.1 0.1 0.1\n" * 15)
    version = imported(tmp_path, ssd_like(), **SSD_LIKE)
    assert version.detection is not None
    assert version.detection.priors is not None
    assert np.frombuffer(version.detection.priors.boxes, "<f4")[:4] == pytest.approx([0.5, 0.25, 0.1, 0.2])
    assert decode(version.encode()) == version


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "can't read the priors"),
        ("0.5 0.5 0.1\n" * 16, "prior 1 has no four numbers"),
        ("0.5 0.5 0.1 0.1\n0.5 0.5 0.1\n", "prior 2 has no four numbers"),
        ("0.5 0.5 0.1 wide\n" * 16, "could not convert string to float: 'wide'"),
        ("", "prior 1 has no four numbers"),
        ("0.5 0.5 0.1 0.1\n" * 15 + "0.5 0.5 0 0.1", "prior 16 is"),
        ("0.5 0.5 0.1 nan\n" * 16, "prior 1 is"),
        ("16 16 8 8\n" * 16, "are they in pixels"),
        ("0.5 0.5 0.1 0.1\n" * 15, "batch x 15 .as there are priors."),
    ],
)
def test_priors_that_are_none_or_of_another_network_are_refused(tmp_path: Path, text: str | None, words: str) -> None:
    if text is not None:
        (tmp_path / "priors.txt").write_text(text)
    with pytest.raises((DataError, ModelError), match=words):
        imported(tmp_path, ssd_like(), **SSD_LIKE)


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


def test_a_byte_order_mark_is_no_part_of_the_first_label(tmp_path: Path) -> None:
    """Editors of Windows write one."""
    (tmp_path / "labels.txt").write_text("\n".join("abcdefghij"), encoding="utf-8-sig")
    (tmp_path / "truth.txt").write_text("a\n" * 32, encoding="utf-8-sig")
    output = {"kind": "classification", "labels": "labels.txt"}
    version = imported(tmp_path, classifier(), output=output, holdout={"path": "holdout", "truth": "truth.txt"})
    assert (version.labels[0], version.truth[0]) == ("a", "0")


def test_a_label_of_two_classes_is_no_right_answer(tmp_path: Path) -> None:
    """ImageNet has two cranes."""
    manifest = project(
        tmp_path, classifier(3), output={"labels": "labels.txt"}, holdout={"path": "holdout", "truth": "truth.txt"}
    )
    (tmp_path / "labels.txt").write_text("crane\ndog\ncrane\n")
    (tmp_path / "truth.txt").write_text("dog\n" * 31 + "crane\n")
    with pytest.raises(DataError, match="line 32: 'crane' names the classes 0 and 2"):
        run(tmp_path, manifest)
    (tmp_path / "truth.txt").write_text("dog\n" * 31 + "2\n")
    assert run(tmp_path, manifest).truth[-2:] == ("1", "2")


def test_characters_must_fit_the_outputs_classes(tmp_path: Path) -> None:
    net = Net()
    net.conv(3, 4, stride=8)
    net.add("Reshape", net.constant(np.array([1, 4, 16], np.int64)))
    net.add("Transpose", perm=[0, 2, 1])
    model = net.model([1, 16, 4])
    (tmp_path / "characters.txt").write_text("a\nb\n", encoding="utf-8-sig")
    text = {"output": {"kind": "text", "text": {"characters": "characters.txt"}}, "acceptance": {"tolerance_abs": 0.1}}
    assert imported(tmp_path, model, **text).characters == ("a", "b", " ")
    (tmp_path / "characters.txt").write_text("a\n")
    with pytest.raises(DataError, match="has 2 characters, space included"):
        imported(tmp_path, model, **text)


def test_a_saved_models_folder_is_one_blob_whatever_its_files_times_and_order(tmp_path: Path) -> None:
    def folder(name: str, names: list[str], time: int) -> Path:
        for inner in names:
            file = tmp_path / name / inner
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(inner.encode() * 3)
            os.utime(file, (time, time))
        return tmp_path / name

    names = ["saved_model.pb", "variables/variables.index", "variables/variables.data"]
    first = original_of(folder("a", names, 10**9), "saved-model")
    assert original_of(folder("b", names[::-1], 2 * 10**9), "saved-model") == first
    (tmp_path / "b" / "assets").mkdir()
    (tmp_path / "b" / "assets" / "more").write_bytes(b"x")
    assert original_of(tmp_path / "b", "saved-model") != first
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.namelist() == sorted(names)
        assert archive.read("saved_model.pb") == b"saved_model.pb" * 3
    (tmp_path / "net.keras").write_bytes(b"PK as it is")
    assert original_of(tmp_path / "net.keras", "keras") == b"PK as it is"


def test_a_version_from_before_originals_can_be_read(tmp_path: Path) -> None:
    version = imported(tmp_path, classifier())
    fields = msgspec.json.decode(version.encode())
    assert fields.pop("original") is None
    assert decode(msgspec.json.encode(fields)) == version


def masked(channels: int) -> onnx.ModelProto:
    net = Net()
    net.conv(3, channels)
    return net.model([1, channels, SIDE, SIDE])


SEGMENTS: dict[str, Any] = {"acceptance": {"tolerance_abs": 0.1}}


def test_a_mask_of_one_channel_wants_the_applications_threshold(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"scores \(1, 1, 32, 32\) has one channel.*give output.segmentation.threshold"
    ):
        imported(tmp_path, masked(1), output={"kind": "segmentation"}, **SEGMENTS)
    told = {"kind": "segmentation", "segmentation": {"threshold": 0.3}}
    assert imported(tmp_path, masked(1), output=told, **SEGMENTS).masks.threshold == 0.3


@pytest.mark.parametrize("stride", [1, 4])
def test_masks_that_lie_otherwise_than_described_are_told(tmp_path: Path, stride: int) -> None:
    net = Net()
    net.conv(3, 5, stride=stride)
    net.add("Transpose", perm=[0, 2, 3, 1])
    model = net.model([1, SIDE // stride, SIDE // stride, 5])
    with pytest.raises(ModelError, match="where layout NHWC has them"):
        imported(tmp_path, model, output={"kind": "segmentation"}, **SEGMENTS)
    told = {"kind": "segmentation", "segmentation": {"layout": "NHWC"}}
    assert imported(tmp_path, model, output=told, **SEGMENTS).masks.layout == "NHWC"


def test_a_threshold_for_scores_of_several_classes_is_refused(tmp_path: Path) -> None:
    told = {"kind": "segmentation", "segmentation": {"threshold": 0.3}}
    with pytest.raises(ModelError, match=r"leave output.segmentation.threshold away"):
        imported(tmp_path, masked(4), output=told, **SEGMENTS)
    with pytest.raises(ModelError, match="is no picture of classes, nor a mask"):
        imported(tmp_path, classifier(), output={"kind": "segmentation"}, **SEGMENTS)


def test_a_classifier_of_one_class_could_answer_nothing_else_and_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"scores \(1, 1\) has one class, which is always the largest"):
        imported(tmp_path, classifier(1))


def test_an_outputs_own_tolerance_names_an_output_that_there_is(tmp_path: Path) -> None:
    acceptance: dict[str, Any] = {"tolerance_abs": 0.5, "outputs": {"scores": {"tolerance_rel": 0.1}}}
    version = imported(tmp_path, classifier(), output={"kind": "raw"}, acceptance=acceptance)
    assert version.acceptance.tolerance("scores") == (0.0, 0.1)
    acceptance["outputs"] = {"score": {"tolerance_rel": 0.1}}
    with pytest.raises(ModelError, match=r"has the outputs scores; acceptance\.outputs names 'score'"):
        imported(tmp_path, classifier(), output={"kind": "raw"}, acceptance=acceptance)
    with pytest.raises(ValidationError, match="give tolerance_abs or tolerance_rel"):
        project(tmp_path, classifier(), output={"kind": "raw"}, acceptance=acceptance | {"outputs": {"scores": {}}})
    with pytest.raises(ValidationError, match="compared by their values"):
        project(tmp_path, classifier(), acceptance=acceptance)
