"""Stage 1, source: networks published under a name. Each importer fetches one and hands on ONNX bytes.

An importer is a function ``(cache folder) -> ONNX bytes``, found in :data:`IMPORTERS` by the name that a Model manifest gives.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgefleet_shared.errors import NotFoundError

from edgefleet_controller.source.importers import darknet, efficientnet_lite

Importer = Callable[[Path], bytes]

IMPORTERS: dict[str, Importer] = {
    "efficientnet-lite0": efficientnet_lite.fetch,
    "yolov3-tiny": darknet.fetch_yolov3_tiny,
}


def importer(name: str) -> Importer:
    """The importer of that name.

    Raises:
        NotFoundError: there is none.
    """
    try:
        return IMPORTERS[name]
    except KeyError as exc:
        raise NotFoundError(f"no importer {name!r}; have: {', '.join(sorted(IMPORTERS))}") from exc
