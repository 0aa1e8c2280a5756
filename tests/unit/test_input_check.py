from __future__ import annotations

from edgefleet_controller.compile.input_check import alternatives, clearly_better
from edgefleet_shared.contract import PictureEncoding

DECLARED = PictureEncoding(mean=(0.0,), std=(255.0,), layout="NCHW", colour="RGB")


def test_the_other_colour_order_and_the_usual_scales_are_tried_and_what_is_declared_is_not() -> None:
    ways = alternatives(DECLARED)
    assert ways["colour BGR"].colour == "BGR"
    assert ways["colour BGR"].std == (255.0,)
    assert "x / 255" not in ways
    assert DECLARED not in ways.values()
    assert {way.layout for way in ways.values()} == {"NCHW"}


def test_means_of_channels_follow_the_order_of_the_colours() -> None:
    ways = alternatives(DECLARED)
    assert ways["ImageNet's mean and spread"].mean[0] == 123.675  # red comes first
    assert ways["colour BGR and ImageNet's mean and spread"].mean[0] == 103.53  # blue does
    turned = alternatives(PictureEncoding(mean=(0.0,), std=(255.0,), layout="NHWC", colour="BGR"))
    assert turned["ImageNet's mean and spread"].mean[0] == 103.53


def test_grey_pictures_have_no_colour_order() -> None:
    ways = alternatives(PictureEncoding(mean=(0.0,), std=(1.0,), layout="NCHW", colour="GREY"))
    assert set(ways) == {"x / 255", "(x - 127.5) / 127.5"}


def test_of_descriptions_that_can_not_be_told_apart_the_one_that_changes_least_is_named() -> None:
    """Where colours say nothing, neither order is better."""
    ways = list(alternatives(DECLARED))
    assert all(" and " in way for way in ways[ways.index("colour BGR and grey levels as they are") :])
    assert clearly_better([10, 11, 56, 57], 64) == 2
    assert clearly_better([10, 11, 40, 63], 64) == 3
    assert clearly_better([56, 50, 57, 20], 64) is None
