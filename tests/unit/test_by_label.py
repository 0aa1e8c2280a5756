"""What is rare may not vanish among the rest: agreement label by label."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest
from edgefleet_controller.compile.by_label import ENOUGH
from edgefleet_controller.compile.port import Figures
from edgefleet_controller.compile.quality import compare, inaccuracies
from edgefleet_controller.manifests.device_class import Accuracy
from edgefleet_controller.model_version import ModelVersion
from edgefleet_shared import answers
from edgefleet_shared.contract import TensorSpec
from edgefleet_shared.reading import BoxDecoding, MaskReading
from unit.test_answers import version

LABELS = ("sound", "scratched", "broken")


def missed(have: dict[str, Any], want: dict[str, Any], told: ModelVersion, budget: Accuracy) -> list[str]:
    figures = compare(have, want, told).figures
    made = Figures(engine="e", engine_version="1", float_bytes=2, compiled_bytes=1, samples=200, **figures)
    assert (made.agreement or 0) >= budget.min_agreement, "all together are well within the budget"
    return inaccuracies(made, budget)


def classifier() -> ModelVersion:
    return version("classification", TensorSpec("y", "FP32", (1, 3)))


def scores(*kinds: int) -> dict[str, Any]:
    return {"y": np.eye(3, dtype=np.float32)[list(kinds)]}


def test_a_class_that_is_rare_may_not_vanish() -> None:
    want, have = scores(*[0] * 190, *[2] * 10), scores(*[0] * 200)
    (miss,) = missed(have, want, classifier(), Accuracy(min_agreement=0.9))
    assert miss == "agreement by label: '2' 0.000 of 10, budget 0.500 for each"


def test_a_class_that_is_rare_may_not_be_seen_everywhere() -> None:
    want, have = scores(*[0] * 490, *[2] * 10), scores(*[0] * 465, *[2] * 35)
    (miss,) = missed(have, want, classifier(), Accuracy(min_agreement=0.9))
    assert "'2' 0.286 of 35" in miss


def test_a_class_that_vanishes_is_not_hidden_by_another_of_the_same_label() -> None:
    """ImageNet's labels have two cranes, the bird and the machine."""
    want, have = scores(*[0] * 180, *[1] * 10, *[2] * 10), scores(*[0] * 190, *[2] * 10)
    told = msgspec.structs.replace(classifier(), labels=("sparrow", "crane", "crane"))
    (miss,) = missed(have, want, told, Accuracy(min_agreement=0.9))
    assert miss == "agreement by label: 'crane (1)' 0.000 of 10, budget 0.500 for each"


def test_what_is_too_rare_to_tell_damage_from_chance_is_left_to_the_whole() -> None:
    want, have = scores(*[0] * 190, *[2] * (ENOUGH - 1)), scores(*[0] * (188 + ENOUGH), 2)
    assert missed(have, want, classifier(), Accuracy(min_agreement=0.9)) == []


def test_a_model_that_gives_one_answer_to_everything_is_told_by_the_few_that_get_another() -> None:
    want, have = scores(*[0] * 93, 1, 2, 2), scores(*[0] * 96)
    (miss,) = missed(have, want, classifier(), Accuracy(min_agreement=0.95))
    assert miss == "agreement by label: 'rare ones together' 0.000 of 3, budget 0.500 for each"
    want = scores(*[0] * 94, 1, 2)
    assert missed(have, want, classifier(), Accuracy(min_agreement=0.95)) == [], "two may be chance"


def test_labels_that_are_rare_each_are_judged_together() -> None:
    want = scores(*[0] * 188, *[1] * 6, *[2] * 6)
    have = scores(*[0] * 188, *[0] * 5, 1, *[0] * 4, 2, 2)
    (miss,) = missed(have, want, classifier(), Accuracy(min_agreement=0.95))
    assert "'rare ones together' 0.250 of 12" in miss


def test_the_class_says_how_much_of_a_label_must_be_kept() -> None:
    want, have = scores(*[0] * 180, *[2] * 20), scores(*[0] * 184, *[2] * 16)
    assert missed(have, want, classifier(), Accuracy(min_agreement=0.9)) == []
    (miss,) = missed(have, want, classifier(), Accuracy(min_agreement=0.9, min_per_label=0.9))
    assert "'2' 0.800 of 20" in miss
    gone = scores(*[0] * 200)
    assert missed(gone, want, classifier(), Accuracy(min_agreement=0.9, min_per_label=0.0)) == []


def boxes(kinds: list[int]) -> dict[str, Any]:
    """One picture for each kind, with one box of it."""
    marks = np.full((len(kinds), 1, 2), 0.1, np.float32)
    marks[range(len(kinds)), 0, kinds] = 0.9
    return {"boxes": np.tile(np.array([[[0, 0, 10, 10]]], np.float32), (len(kinds), 1, 1)), "scores": marks}


def test_boxes_of_a_kind_that_is_rare_may_not_vanish() -> None:
    told = BoxDecoding(decoder="boxes", anchors=(), masks=(), threshold=0.5, nms_iou=0.45, match_iou=0.5)
    specs = (TensorSpec("boxes", "FP32", (1, 1, 4)), TensorSpec("scores", "FP32", (1, 1, 2)))
    want = boxes([0] * 190 + [1] * 10)
    have = {"boxes": want["boxes"], "scores": want["scores"].copy()}
    have["scores"][190:] = 0.1
    (miss,) = missed(have, want, version("detection", *specs, detection=told), Accuracy(min_agreement=0.9))
    assert "'1' 0.000 of 10" in miss


@pytest.mark.parametrize("pictures", [ENOUGH, ENOUGH - 1])
def test_a_class_of_few_pixels_may_not_vanish_from_all_pictures(pictures: int) -> None:
    """5 x 5 pixels of 200 x 200: less than a speck of each picture, and what the network is there to find."""
    want = np.zeros((20, 1, 200, 200), np.float32)
    want[:pictures, 0, 50:55, 20:25] = 1.0
    want[pictures:, 0, 50:150, 20:120] = 1.0  # the other pictures have much of it
    two = np.concatenate([want * 0 + 0.5, want], axis=1)
    three = np.concatenate([two, want * 0], axis=1)
    three[:pictures, 2], three[:pictures, 1] = want[:pictures, 0], 0.0
    have = three.copy()
    have[:, 2] = 0.0
    assert answers.SPECK_SHARE * want[0].size > 25
    spec = TensorSpec("y", "FP32", (1, 3, 200, 200))
    told = version("segmentation", spec, masks=MaskReading())
    found = missed({"y": have}, {"y": three}, told, Accuracy(min_agreement=0.9))
    assert found == (["agreement by label: '2' 0.000 of 200, budget 0.500 for each"] if pictures >= ENOUGH else [])


def test_labels_are_told_by_their_names() -> None:
    told = msgspec.structs.replace(classifier(), labels=LABELS)
    want, have = scores(*[0] * 190, *[2] * 10), scores(*[0] * 200)
    assert "'broken' 0.000" in missed(have, want, told, Accuracy())[0]
