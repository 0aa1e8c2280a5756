"""Samples: pictures in folders and archives, tensors, and Python functions that give them."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from edgefleet_controller.manifests import Model
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.source import samples_entry
from edgefleet_controller.source.importing import import_model
from edgefleet_shared.artifact import Layout
from edgefleet_shared.errors import DataError
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, TiffImagePlugin
from safetensors.numpy import load_file, save_file
from support.broker import until
from support.networks import SIDE, classifier, project, write_pictures
from support.processes import assert_ends


def run(folder: Path, manifest: Model) -> ModelVersion:
    return import_model(manifest, folder, Layout(folder / "layout"), cache=folder / "cache")


def imported(folder: Path, model: onnx.ModelProto, **spec: Any) -> ModelVersion:
    return run(folder, project(folder, model, **spec))


def samples_in_a_process(manifest: Model, folder: Path) -> str:
    """How reading a manifest's samples ends, in a process of its own that has a minute."""
    source = (
        "import sys; from pathlib import Path; from edgefleet_controller.manifests import Model\n"
        "from edgefleet_controller.source.importing import import_model; from edgefleet_shared.artifact import Layout\n"
        "folder = Path(sys.argv[1]); manifest = Model.model_validate_json(sys.argv[2])\n"
        "import_model(manifest, folder, Layout(folder / 'layout'), cache=folder / 'cache')\n"
    )
    command = [sys.executable, "-c", source, str(folder), manifest.model_dump_json(by_alias=True)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False).stderr


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


def spoil_nearly_alike(folder: Path) -> None:
    content = (folder / "p000.png").read_bytes()
    for file in sorted(folder.iterdir())[4:]:
        file.write_bytes(content)


def spoil_deep(folder: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (48, 48)).astype(np.uint16)
    Image.fromarray(deep).save(folder / "p003.png")


def spoil_deep_colours(folder: Path) -> None:
    """Twelve bits in sixteen, as cameras for industry write them: Pillow opens these as pictures of 8 bits that are nearly black."""
    values = np.random.default_rng(0).integers(0, 4096, (48, 48, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    parts = {b"IHDR": struct.pack(">IIBBBBB", 48, 48, 16, 2, 0, 0, 0), b"IDAT": zlib.compress(rows), b"IEND": b""}
    chunks = [
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part))
        for kind, part in parts.items()
    ]
    (folder / "p003.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def spoil_sorted(folder: Path) -> None:
    for file in sorted(folder.iterdir())[3:]:
        (folder / "faulty").mkdir(exist_ok=True)
        file.rename(folder / "faulty" / file.name)


def spoil_sorted_in_part(folder: Path) -> None:
    write_pictures(folder / "faulty", 2, 77)


def frames(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(9)
    return [Image.fromarray(rng.integers(0, 256, (48, 48, 3)).astype(np.uint8)) for _ in range(count)]


def spoil_animated(folder: Path) -> None:
    first, *others = frames(3)
    first.save(folder / "p003.png", save_all=True, append_images=others)


def spoil_paged(folder: Path) -> None:
    first, *others = frames(4)
    first.save(folder / "p0031.tiff", save_all=True, append_images=others)


def spoil_second_page(folder: Path) -> None:
    spoil_paged(folder)
    content = bytearray((folder / "p0031.tiff").read_bytes())
    (first,) = struct.unpack_from("<I", content, 4)
    (tags,) = struct.unpack_from("<H", content, first)
    (second,) = struct.unpack_from("<I", content, first + 2 + 12 * tags)
    struct.pack_into("<H", content, second + 2, 255)  # where ImageWidth stood
    (folder / "p0031.tiff").write_bytes(content)


def spoil_unread(folder: Path) -> None:
    (folder / "p003.png").rename(folder / "p003.HEIC")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_unread, r"has 1 pictures of a kind that is not read here, such as p003\.HEIC"),
        (spoil_nearly_alike, "16 samples in .*, of which 4 are different ones; 8 are needed"),
        (spoil_deep, r"p003\.png has 16 or more bits per value .*I;16"),
        (spoil_deep_colours, r"p003\.png has 16 or more bits per value .*RGB;16B"),
        (
            spoil_sorted,
            "has 3 pictures, 8 are needed, beside those in folders of its own, such as faulty, which are not looked into",
        ),
        (
            spoil_sorted_in_part,
            "has 16 pictures, beside those in folders of its own, such as faulty, which are not looked into",
        ),
        (spoil_animated, r"p003\.png holds 3 pictures \(frames or pages\), of which only the first would be read"),
        (spoil_paged, r"p0031\.tiff holds 4 pictures \(frames or pages\), of which only the first would be read"),
        (spoil_second_page, r"calibration: can't read the picture .*p0031\.tiff: Missing dimensions"),
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


def test_a_smaller_copy_inside_a_pictures_file_is_no_second_picture(tmp_path: Path) -> None:
    """Telephones put previews and maps of brightness behind a JPEG, scanners a thumbnail behind a page."""
    manifest = project(tmp_path, classifier())
    first, second = frames(2)
    first.save(tmp_path / "calibration" / "p003.jpg", "MPO", save_all=True, append_images=[second])
    reduced = TiffImagePlugin.ImageFileDirectory_v2()
    reduced[254] = 1  # NewSubfileType: of another picture in this file, in lower resolution
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / "calibration" / "p004.tiff", True) as file:
        first.save(file, "TIFF")
        file.newFrame()
        second.resize((16, 16)).save(file, "TIFF", tiffinfo=reduced)
    run(tmp_path, manifest)


def test_more_pictures_wanted_than_there_are_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holdout: .* has 32 pictures, 100 are needed"):
        imported(tmp_path, classifier(), holdout={"path": "holdout", "count": 100})


def test_a_picture_in_two_splits_is_refused(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier())
    (tmp_path / "holdout" / "p001.png").write_bytes((tmp_path / "calibration" / "p005.png").read_bytes())
    with pytest.raises(DataError, match=r"p001\.png \(holdout\) is the same picture as p005\.png \(calibration\)"):
        run(tmp_path, manifest)


@pytest.mark.parametrize("ending", [".jpg", ".webp"])
def test_a_picture_that_was_saved_again_is_the_same_picture(tmp_path: Path, ending: str) -> None:
    manifest = project(tmp_path, classifier())
    with Image.open(tmp_path / "calibration" / "p004.png") as picture:
        picture.resize((96, 80), Image.Resampling.BICUBIC).save(tmp_path / "golden" / f"z{ending}", quality=60)
    words = rf"1 of 9 pictures of golden are in calibration too but for their encoding or size: z\{ending} is p004\.png"
    with pytest.raises(DataError, match=words):
        run(tmp_path, manifest)


def test_a_small_picture_with_hard_edges_that_was_saved_again_is_the_same_picture(tmp_path: Path) -> None:
    """JPEG blurs what is drawn in few pixels, and moves its averages further than a photo's."""
    manifest = project(tmp_path, classifier())
    chance = np.random.default_rng(0)
    for file in sorted(tmp_path.glob("*/p*.png")):
        drawn = np.zeros((SIDE, SIDE), np.uint8)
        for row, column in chance.integers(2, SIDE - 4, (12, 2)):
            drawn[row : row + 2, column : column + 3] = chance.integers(120, 256)
        Image.fromarray(drawn).save(file)
    for number in range(4):
        with Image.open(tmp_path / "calibration" / f"p{number:03}.png") as picture:
            picture.save(tmp_path / "golden" / f"p{number:03}.jpg", quality=40)
        (tmp_path / "golden" / f"p{number:03}.png").unlink()
    with pytest.raises(
        DataError, match=r"4 of 8 pictures of golden are in calibration too but for their encoding or size"
    ):
        run(tmp_path, manifest)


def test_frames_of_a_camera_that_stands_still_are_different_pictures(tmp_path: Path) -> None:
    """All of them are as near each other as one that was saved again is to itself."""
    manifest = project(tmp_path, classifier())
    with Image.open(tmp_path / "calibration" / "p000.png") as picture:
        scene = np.asarray(picture.convert("RGB")).astype(float)
    chance = np.random.default_rng(0)
    for file in sorted(tmp_path.glob("*/p*.png")):
        frame = scene + chance.normal(0, 3, scene.shape)
        row, column = chance.integers(8, 32, 2)
        frame[row : row + 3, column : column + 3] = 255  # what passes by
        Image.fromarray(np.clip(frame, 0, 255).astype(np.uint8)).save(file)
    assert run(tmp_path, manifest).golden.count == 8


def test_one_pair_among_many_pictures_is_chance(tmp_path: Path) -> None:
    """Of 10,000 test pictures of a public set one is nearly a training picture."""
    manifest = project(tmp_path, classifier(), counts=(16, 59, 8))
    with Image.open(tmp_path / "calibration" / "p004.png") as picture:
        picture.save(tmp_path / "holdout" / "z.jpg", quality=60)
    assert run(tmp_path, manifest).holdout.count == 60


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


PICTURES = np.random.default_rng(5).integers(0, 256, (16, SIDE, SIDE, 3)).astype(np.uint8)


BLANK = PICTURES.copy()
BLANK[3] = 77


def test_an_archive_of_pictures_is_stored_as_it_is(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier(), calibration={"path": "c.safetensors"})
    tensors(tmp_path, PICTURES)
    version = run(tmp_path, manifest)
    stored = load_file(Layout(tmp_path / "layout").path(version.calibration.digest))["image"]
    assert np.array_equal(stored, PICTURES)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (PICTURES[:, :16], r"expected N x 32 x 32 x 3 \(uint8 pictures\)"),
        (PICTURES.transpose(0, 3, 1, 2), r"has shape \(16, 3, 32, 32\), expected N x 32 x 32 x 3"),
        (PICTURES[:5], "has 5 samples, 8 are needed"),
        (np.full_like(PICTURES, 9), "constant, 9.0 everywhere"),
        (BLANK, "sample 3 is blank: every value is 77"),
        (PICTURES.astype(np.int64), "is int64, expected float32, or uint8 pictures"),
    ],
)
def test_an_archive_of_pictures_that_mean_nothing_is_refused(tmp_path: Path, array: Any, words: str) -> None:
    manifest = project(tmp_path, classifier(), calibration={"path": "c.safetensors"})
    tensors(tmp_path, np.ascontiguousarray(array))
    with pytest.raises(DataError, match=words):
        run(tmp_path, manifest)


@pytest.mark.parametrize("encoded", [False, True], ids=["as pictures", "encoded"])
def test_a_picture_of_a_folder_is_found_in_an_archive_too(tmp_path: Path, encoded: bool) -> None:
    manifest = project(tmp_path, classifier(), calibration={"path": "c.safetensors"})
    first = run(tmp_path, project(tmp_path, classifier()))
    array = PICTURES.copy()
    array[4] = load_file(Layout(tmp_path / "layout").path(first.holdout.digest))["image"][7]
    if encoded:  # as the manifest says: mean 127.5, spread 64
        array = ((array.astype(np.float64) - 127.5) / 64).astype(np.float32).transpose(0, 3, 1, 2)
    tensors(tmp_path, np.ascontiguousarray(array))
    with pytest.raises(DataError, match=r"p007\.png \(holdout\) is the same picture as sample 4 \(calibration\)"):
        run(tmp_path, manifest)


ENTRY = """
import msgspec
import numpy as np
def samples():
    chance = np.random.default_rng(3)
    for _ in range(20):
        yield {"image": chance.integers(0, 256, (32, 32, 3)).astype(np.uint8)}
def none(): return []
def broken():
    yield {"image": np.zeros((32, 32, 3), np.uint8)}
    raise RuntimeError("the camera is gone")
def lists(): yield [1, 2]
def mixed():
    yield {"image": np.zeros((32, 32, 3), np.uint8)}
    yield {"image": np.zeros((32, 32, 1), np.uint8)}
def doubles(): yield {"image": np.zeros((3, 32, 32))}
def dies():
    import os
    os.abort()
def leaves():
    print("all is well")
    raise SystemExit
def narrow():
    for number in range(16): yield {"image": np.full((3, 32, 32), number, np.uint8)}
"""


def test_a_python_function_gives_samples_from_a_process_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        ENTRY + f"import os\nopen({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
    )
    version = run(tmp_path, project(tmp_path, classifier(), calibration={"entry": "own.py:samples", "count": 12}))
    assert version.calibration.count == 12
    assert (tmp_path / "pid").read_text() != str(os.getpid())
    again = run(tmp_path, project(tmp_path, classifier(), calibration={"entry": "own.py:samples", "count": 12}))
    assert again.digest == version.digest


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("none", "own.py:none failed: it yields no sample"),
        ("broken", "own.py:broken failed: RuntimeError: the camera is gone"),
        ("lists", "sample 0 is a list, expected a dict of arrays by input name"),
        ("mixed", r"sample 1: image is uint8 \(32, 32, 1\), the first one uint8 \(32, 32, 3\)"),
        ("doubles", "sample 0: image is float64, expected uint8"),
        ("missing", "there is no function missing"),
        ("dies", "own.py:dies failed: status -6"),
        ("leaves", "own.py:leaves failed: it ended the process before it had given all samples"),
        ("narrow", r"image in own.py:narrow has shape \(16, 3, 32, 32\)"),
    ],
)
def test_a_function_that_gives_no_samples_is_told(tmp_path: Path, function: str, words: str) -> None:
    (tmp_path / "own.py").write_text(ENTRY)
    with pytest.raises(DataError, match=words):
        run(tmp_path, project(tmp_path, classifier(), calibration={"entry": f"own.py:{function}"}))


def test_a_function_that_hangs_is_stopped_with_what_it_started(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import subprocess\ndef hangs():\n    child = subprocess.Popen(['sleep', '600'])\n"
        "    open('child', 'w').write(str(child.pid))\n    child.wait()\n    yield {}\n"
    )
    with pytest.raises(DataError, match="ran past its limit of 3 s and was stopped"):
        samples_entry.write("calibration", tmp_path, "own.py:hangs", None, tmp_path / "x.safetensors", limit_s=3.0)
    assert_ends(int((tmp_path / "child").read_text()), "what it started")


def test_an_archive_of_another_kind_is_told_as_a_file_not_as_a_folder_that_is_missing(tmp_path: Path) -> None:
    (tmp_path / "samples.tar").write_bytes(b"x" * 512)
    with pytest.raises(DataError, match=r"samples\.tar is a file; .* \.safetensors file"):
        run(tmp_path, project(tmp_path, classifier(), calibration={"path": "samples.tar"}))


def test_a_function_without_an_end_is_stopped_before_it_takes_all_memory(tmp_path: Path) -> None:
    endless = "import numpy as np\ndef endless():\n    while True: yield {'image': np.zeros((32, 32, 3), np.uint8)}\n"
    (tmp_path / "own.py").write_text(endless)
    target = tmp_path / "x.safetensors"
    with pytest.raises(DataError, match=r"first 4 samples take more than the 10,000 bytes .* by count"):
        samples_entry.write("calibration", tmp_path, "own.py:endless", None, target, limit_s=20.0, most_bytes=10_000)
    samples_entry.write("calibration", tmp_path, "own.py:endless", 3, target, most_bytes=10_000)


def test_a_function_ends_with_the_program_that_runs_it(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import os, time\ndef hangs():\n    open('new', 'w').write(str(os.getpid()))\n    os.rename('new', 'child')\n    time.sleep(600)\n"
    )
    said = f"write('holdout', Path({str(tmp_path)!r}), 'own.py:hangs', None, Path('x'))"
    program = f"from pathlib import Path\nfrom edgefleet_controller.source.samples_entry import write\n{said}"
    with subprocess.Popen([sys.executable, "-c", program]) as adding:
        until((tmp_path / "child").exists, "the function runs")
        adding.kill()
    assert_ends(int((tmp_path / "child").read_text()), "the function")


def test_a_function_in_a_file_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file .*gone\.py"):
        run(tmp_path, project(tmp_path, classifier(), calibration={"entry": "gone.py:samples"}))


def pruned(folder: Path, **prune: Any) -> Model:
    return project(folder, classifier(), counts=(70, 32, 8), prune={"structured": 0.5, **prune})


def test_training_samples_may_calibrate_and_may_not_judge(tmp_path: Path) -> None:
    write_pictures(tmp_path / "training", 80, 7)
    manifest = pruned(tmp_path, training={"path": "training"})
    (tmp_path / "training" / "p001.png").write_bytes((tmp_path / "calibration" / "p005.png").read_bytes())
    run(tmp_path, manifest)
    (tmp_path / "training" / "p002.png").write_bytes((tmp_path / "holdout" / "p003.png").read_bytes())
    with pytest.raises(DataError, match=r"p003\.png \(holdout\) is the same picture as p002\.png \(training\)"):
        run(tmp_path, manifest)


def test_too_few_samples_to_prune_with_and_a_label_out_of_range_are_refused(tmp_path: Path) -> None:
    few = project(tmp_path, classifier(), prune={"structured": 0.5})
    with pytest.raises(DataError, match="calibration: 16 samples, pruning needs at least 64"):
        run(tmp_path, few)
    write_pictures(tmp_path / "training", 80, 7)
    (tmp_path / "labels.txt").write_text("\n".join(str(i % 11) for i in range(80)))
    with pytest.raises(DataError, match=r"labels\.txt, line 11: '10' is no label and no number from 0 to 9"):
        run(tmp_path, pruned(tmp_path, training={"path": "training", "truth": "labels.txt"}))


def test_a_file_that_is_no_safetensors_is_refused(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier(), calibration={"path": "c.safetensors"})
    (tmp_path / "c.safetensors").write_bytes(b"\xff" * 64)
    with pytest.raises(DataError, match="not a safetensors file"):
        run(tmp_path, manifest)


def test_a_safetensors_file_that_was_cut_off_is_told_as_that(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier(), calibration={"path": "c.safetensors"})
    path = tmp_path / "c.safetensors"
    save_file({"image": np.zeros((20, 3, 8, 8), np.float32)}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[:9000])
    with pytest.raises(DataError, match=f"is cut off: 9000 of {len(whole)} bytes are there"):
        run(tmp_path, manifest)


def test_a_folder_of_pictures_needs_a_picture_input(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="describes no picture input"):
        imported(tmp_path, classifier(), inputs=[])


def test_a_drawing_under_a_pictures_name_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PostScript is a program; what draws it is another one, which a picture from anywhere must not reach."""
    manifest = project(tmp_path, classifier())
    Image.new("RGB", (48, 40), (1, 2, 3)).save(tmp_path / "drawing.eps")
    (tmp_path / "drawing.eps").rename(tmp_path / "calibration" / "p000.png")
    programs, started = tmp_path / "programs", tmp_path / "started"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {started}\nexit 1\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=os.pathsep)
    with pytest.raises(DataError, match=r"can't read the picture .*p000\.png"):
        run(tmp_path, manifest)
    assert not started.exists()


def test_a_pipe_under_a_pictures_name_is_not_waited_for(tmp_path: Path) -> None:
    manifest = project(tmp_path, classifier())
    os.mkfifo(tmp_path / "calibration" / "p100.png")
    asked = samples_in_a_process(manifest, tmp_path)
    assert "p100.png is no file" in asked


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


def test_samples_are_of_the_networks_own_types(tmp_path: Path) -> None:
    """A table of symbols and a mode beside it, which is the same in all samples."""
    nodes = [
        helper.make_node("Gather", ["table", "symbols"], ["rows"]),
        helper.make_node("Cast", ["mode"], ["factor"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["rows", "factor"], ["scores"]),
    ]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, s) for n, s in (("symbols", [1, 6]), ("mode", [1]))]
    graph = helper.make_graph(
        nodes, "g", inputs, [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [1, 6, 4])],
        [numpy_helper.from_array(np.random.default_rng(0).normal(size=(9, 4)).astype(np.float32), "table")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    project(tmp_path, model)
    for seed, split in enumerate(("calibration", "holdout", "golden")):
        symbols = np.random.default_rng(seed).integers(0, 9, (8, 6))
        save_file({"symbols": symbols, "mode": np.full(8, 3)}, tmp_path / f"{split}.safetensors")
    paths: dict[str, Any] = {split: {"path": f"{split}.safetensors"} for split in ("calibration", "holdout", "golden")}
    told = {"inputs": [], "output": {"kind": "raw"}, "acceptance": {"tolerance_abs": 0.1}}
    version = run(tmp_path, project(tmp_path, model, **paths, **told))
    assert [spec.datatype for spec in version.inputs] == ["INT64", "INT64"]
    save_file({"symbols": symbols.astype(np.float32), "mode": np.full(8, 3)}, tmp_path / "golden.safetensors")
    with pytest.raises(DataError, match=r"golden: symbols in .* is float32, expected int64"):
        run(tmp_path, project(tmp_path, model, **paths, **told))
