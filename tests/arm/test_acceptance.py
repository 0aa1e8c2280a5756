"""What the compiler makes for Raspberry Pis, accepted by the real agent in Debian userlands for Arm. The kernel below is this host's, the
processor is qemu's: answers are Arm's, times and memory are the emulator's, and what it can't confine the report says."""

from __future__ import annotations

from pathlib import Path

import msgspec
from edgefleet_controller.manifests import DeviceClass
from edgefleet_shared import artifact
from edgefleet_shared.artifact import MODEL_LAYER, Layout
from edgefleet_shared.contract import Verdict
from edgefleet_shared.fingerprint import Fingerprint, version_within
from support.arm import CLASSES, KINDS, Board, Compiled


def like(board: Board) -> list[DeviceClass]:
    found = [one for one in CLASSES if board.kind.like(one)]
    assert found
    return found


def test_every_raspberry_pi_class_has_a_userland_that_is_like_it() -> None:
    assert [one.name for one in CLASSES if not any(kind.like(one) for kind in KINDS.values())] == []


def test_the_agent_finds_the_board_that_its_classes_describe(board: Board) -> None:
    found = msgspec.json.decode(board.fingerprint(), type=Fingerprint)
    assert found.arch == board.kind.architecture.machine
    for one in like(board):
        assert version_within(found.engines[one.spec.engine], one.spec.engine_version), (one.name, found.engines)


def test_int8_artifacts_are_accepted_on_arm(board: Board, compiled: Compiled) -> None:
    for one in like(board):
        # There is no sensor in a userland; the next test has the ceiling.
        made = compiled.artifact(one, max_celsius=None)
        assert made.precision == "int8"
        report = board.accept(compiled.layout, made.artifact.digest)
        print(f"{one.name}: {report.verdict.value}; {report.figures}; unconfined: {'; '.join(report.unconfined)}")
        assert report.verdict is Verdict.PASSED, report.reason
        assert report.figures is not None
        assert report.figures.golden_count == compiled.version.golden.count
        assert report.figures.agreement == 1.0
        assert report.figures.cosine > 0.99
        config = compiled.layout.config(compiled.layout.manifest(made.artifact.digest))
        assert report.figures.providers == config.contract.allowed_providers
        # What the class asks of the board and an emulator has not is said, not made up.
        assert any("power" in what for what in report.unmeasured)
        for layer in ("landlock", "seccomp", "address space"):
            assert any(what.startswith(layer) for what in report.unconfined), report.unconfined


def test_the_classes_own_temperature_ceiling_is_inconclusive_where_there_is_no_sensor(
    board: Board, compiled: Compiled
) -> None:
    made = compiled.artifact(like(board)[0])
    report = board.accept(compiled.layout, made.artifact.digest)
    assert report.verdict is Verdict.INCONCLUSIVE
    assert "temperature" in report.reason
    assert {row.name for row in report.measurements if row.verdict is not Verdict.PASSED} == {"temperature"}


def changed(layout: Layout, digest: str, model: Path | bytes, folder: Path) -> tuple[Layout, str]:
    """The same artifact with another model file, as a compiler that went wrong would have packed it."""
    other = Layout(folder / "changed")
    manifest = layout.manifest(digest)
    layers = [
        (blob.media_type, model if blob.media_type == MODEL_LAYER else layout.path(blob.digest))
        for blob in manifest.layers
    ]
    return other, artifact.build(other, layout.config(manifest), layers).digest


def test_a_network_that_answers_otherwise_fails_on_arm(board: Board, compiled: Compiled, tmp_path: Path) -> None:
    one = like(board)[0]
    made = compiled.artifact(one, max_celsius=None)
    wrong = Compiled(tmp_path / "wrong", seed=1).artifact(one, max_celsius=None)
    wrong_layout = Layout(tmp_path / "wrong" / "layout")
    model = wrong_layout.path(wrong_layout.manifest(wrong.artifact.digest).layer(MODEL_LAYER).digest)
    report = board.accept(*changed(compiled.layout, made.artifact.digest, model, tmp_path))
    assert report.verdict is Verdict.FAILED
    assert "agreement" in report.reason


def test_a_damaged_model_fails_while_it_loads_on_arm(board: Board, compiled: Compiled, tmp_path: Path) -> None:
    made = compiled.artifact(like(board)[0], max_celsius=None)
    manifest = compiled.layout.manifest(made.artifact.digest)
    whole = compiled.layout.path(manifest.layer(MODEL_LAYER).digest).read_bytes()
    report = board.accept(
        *changed(compiled.layout, made.artifact.digest, whole[:200] + bytes(len(whole) - 200), tmp_path)
    )
    assert report.verdict is Verdict.FAILED
    assert "while loading the model" in report.reason
