"""The demo's four versions: receives the demo's manifests and photos, hands on one Model manifest each.

1 is calibrated on one set of photos, 2 on another: other scales in every layer, a different build. 3 is broken by a mistake that people
make, 4 by something that people leave in a graph (:mod:`edgefleet_controller.demo.models`). All go through the normal import and compile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import yaml
from edgefleet_shared.errors import DataError, EnvironmentProblem
from PIL import Image

from edgefleet_controller import model_version
from edgefleet_controller.client import FleetClient
from edgefleet_controller.demo import models
from edgefleet_controller.demo.traffic import Floats

MODEL = "efficientnet-lite0"
SIDE = 224
FEW = 8


def read_manifests(folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any], dict[str, Any]]:
    """(device classes, model, rollout) as written in ``manifests/demo``.

    Raises:
        EnvironmentProblem: the folder is not there.
    """
    try:
        classes = list(yaml.safe_load_all((folder / "classes.yaml").read_text()))
        model = yaml.safe_load((folder / "model.yaml").read_text())
        rollout = yaml.safe_load((folder / "rollout.yaml").read_text())
    except FileNotFoundError as exc:
        raise EnvironmentProblem(
            f"{exc.filename} is missing", hint="run the demo in the repository: make demo"
        ) from exc
    return classes, model, rollout


class Versions:
    """Writes a Model manifest per version.

    Args:
        model: the demo's Model manifest.
        photos: folder with calibration, calibration-2, holdout and golden.
        folder: where manifests and made files go.
        counts: pictures per split.
    """

    def __init__(self, model: dict[str, Any], photos: Path, folder: Path, counts: dict[str, int]) -> None:
        self._model, self._photos, self._folder, self._counts = model, photos, folder, counts
        folder.mkdir(parents=True, exist_ok=True)

    def first(self) -> Path:
        return self._write("1", {})

    def second(self) -> Path:
        other = {"path": str(self._photos / "calibration-2"), "count": self._counts["calibration-2"]}
        return self._write("2", {"calibration": other})

    def third(self, client: FleetClient) -> Path:
        """Calibrated on tensors that were normalised twice."""
        version, layout = self._stored(client)
        assert version.encoding is not None
        pictures, tensors = self._folder / "pictures.safetensors", self._folder / "normalised-twice.safetensors"
        pictures.write_bytes(layout)
        models.normalised_twice(pictures, version.encoding, tensors)
        return self._write("3", {"calibration": {"path": str(tensors), "method": "minmax"}})

    def fourth(self, client: FleetClient) -> Path:
        """With a debugging histogram of 1.2 GB left in the graph."""
        version, _ = self._stored(client)
        network = self._folder / "with-histogram.onnx"
        network.write_bytes(models.with_memory_bomb(client.blob(version.network)))
        # The float reference of each picture costs that histogram too: a handful is enough to see it die.
        few = {
            split: {"path": str(self._photos / split), "count": FEW} for split in ("calibration", "holdout", "golden")
        }
        return self._write("4", {"source": {"path": str(network)}, "sizes": {}} | few)

    def _stored(self, client: FleetClient) -> tuple[model_version.ModelVersion, bytes]:
        (shown,) = client.models(MODEL, "1")
        version = model_version.decode(client.blob(shown["digest"]))
        return version, client.blob(version.calibration.digest)

    def _write(self, version: str, changes: dict[str, Any]) -> Path:
        spec = dict(self._model["spec"]) | {"version": version}
        for split in ("calibration", "holdout", "golden"):
            spec[split] = dict(spec[split]) | {"path": str(self._photos / split), "count": self._counts[split]}
        path = self._folder / f"model-{version}.yaml"
        path.write_text(yaml.safe_dump(self._model | {"spec": spec | changes}, sort_keys=False))
        return path


def live_photos(folder: Path, model: dict[str, Any]) -> Floats:
    """Photos as the boards' applications send them: resized, cropped, normalised; N x 3 x 224 x 224 float32.

    Raises:
        DataError: there are none.
    """
    (told,) = model["spec"]["inputs"]
    side = int(told["resize"])
    out = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        scale = side / min(picture.size)
        picture = picture.resize(
            (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BILINEAR
        )
        left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
        pixels = np.asarray(picture.crop((left, top, left + SIDE, top + SIDE)), np.float32)
        out.append(((pixels - told["mean"][0]) / told["std"][0]).transpose(2, 0, 1))
    if not out:
        raise DataError(f"no photos in {folder}")
    return np.ascontiguousarray(np.stack(out), np.float32)
