from __future__ import annotations

from edgefleet_controller.compile.input_check import alternatives
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
