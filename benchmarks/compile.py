"""What the compiler ships, against plain onnxruntime and NNCF post-training quantization in the same run, on held-out samples.

Each subject is compiled by the normal pipeline with full effort for onnxruntime and for OpenVINO on this machine; plain quantization of the
same network with the same calibration samples runs on the same engine, interleaved with ours and with float, one thread. onnxruntime's
peer is onnxruntime's own quantizer, OpenVINO's is NNCF.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import compile_subjects as subjects
from edgefleet_controller.compile.evaluator import Evaluator
from edgefleet_controller.compile.pipeline import compile_version
from edgefleet_controller.compile.port import CompileResult, Figures, target_named
from edgefleet_controller.compile.recipe import Recipe
from edgefleet_controller.compile.steps import Limits, Steps
from edgefleet_controller.compile.toolchains import Toolchains
from edgefleet_controller.manifests import DeviceClass, Model
from edgefleet_controller.model_version import ModelVersion
from edgefleet_controller.settings import default_cache
from edgefleet_controller.source.importing import import_model
from edgefleet_shared import chunks
from edgefleet_shared.artifact import MODEL_LAYER, Layout
from frame import Row, finish

PEERS = {"onnxruntime": "ort", "openvino": "nncf"}
PEER_NAMES = {"onnxruntime": "plain onnxruntime PTQ", "openvino": "NNCF PTQ"}
HERE = Path(__file__).parent


class Outcome(NamedTuple):
    """Ours and the peer, measured in one process; and what was shipped, in words."""

    ours: Figures
    peer: Figures
    precision: str
    why: str

    def speed(self, figures: Figures) -> float:
        assert figures.p50_ms
        assert figures.float_p50_ms
        return figures.float_p50_ms / figures.p50_ms


class Bench:
    """One folder of subjects, a layout and a cache."""

    def __init__(self, folder: Path, effort: str, engines: tuple[str, ...]) -> None:
        self.engines = engines
        self._folder, self.effort = folder, effort
        self.layout = Layout(folder / "layout")
        self._cache = default_cache()
        self._toolchains = Toolchains(self._cache)

    def subject(self, make: Callable[[Path, Path], Model]) -> ModelVersion:
        folder = self._folder / make.__name__
        folder.mkdir(parents=True, exist_ok=True)
        return import_model(make(self._cache, folder), folder, self.layout, cache=self._cache)

    def run(self, version: ModelVersion, engine: str, min_agreement: float, prefer: str = "latency") -> Outcome:
        device_class = DeviceClass.model_validate({"kind": "DeviceClass", "metadata": {"name": f"bench-{engine}"}, "spec": {
            "arch": platform.machine(), "engine": engine,
            "accuracy": {"min_agreement": min_agreement, "min_per_label": min(min_agreement, 0.5)},
            "cpu_features": ["avx512_vnni"] if _vnni() else [],
            "budgets": {"latency_p95_ms": 10_000.0, "memory_bytes": 4 << 30}, "search": {"effort": self.effort, "prefer": prefer},
        }})  # fmt: skip
        cache = self._folder / "cache"
        result = compile_version(
            version, device_class, self.layout, self._toolchains, cache=cache, ship_despite_quality=True
        )
        blob = self.layout.manifest(result.artifact.digest).layer(MODEL_LAYER)
        target = target_named(engine)
        toolchain = self._toolchains.ensure(target.toolchain)
        with tempfile.TemporaryDirectory() as temporary:
            work = Path(temporary)
            options = target.options(device_class.spec, version)
            steps = Steps(
                version, device_class, target, options, toolchain, self.layout, self._toolchains, cache, work,
                lambda *_: None, Limits(),
            )  # fmt: skip
            evaluator = Evaluator(steps, version, device_class, target, toolchain, self.layout, None)
            peer = work / "peer"
            request = {
                "network": str(steps.prepare() / "simplified.onnx"), "calibration": steps.samples(version.calibration),
                "compiled": str(peer), "reduce_range": not _vnni(),
            }  # fmt: skip
            (work / "peer.json").write_text(json.dumps(request))
            subprocess.run(
                [toolchain.python, str(HERE / "compile_peers.py"), PEERS[engine], str(work / "peer.json")],
                check=True, cwd=work, capture_output=True, env={"ORT_DISABLE_TELEMETRY": "1", "NNCF_CI": "1", "DO_NOT_TRACK": "1"},
            )  # fmt: skip
            ours, theirs = evaluator.measure([(Recipe(), self.layout.path(blob.digest)), (Recipe(ranges="peer"), peer)])
        print(f"  {version.model} on {engine}: {result.why}", flush=True)
        for name, one in (("ours", ours), (PEER_NAMES[engine], theirs)):
            f = one.candidate.figures
            print(
                f"    {name}: agreement {f.agreement:.3f} {f.compiled_bytes:,} bytes {f.p50_ms:.2f} ms (float {f.float_p50_ms:.2f})"
            )
        return Outcome(ours.candidate.figures, theirs.candidate.figures, result.precision, result.why)

    def sent_bytes(self, artifact: str) -> int:
        """What is published of a whole artifact: manifest, config and every layer, as :mod:`edgefleet_shared.chunks` packs them."""
        blobs = [blob.digest for blob in self.layout.manifest(artifact).blobs()]
        return sum(chunks.sent_bytes(self.layout.path(digest)) for digest in (artifact, *blobs))

    def ship(self, version: ModelVersion, **spec: Any) -> CompileResult:
        """One class for onnxruntime here."""
        fields = {
            "arch": platform.machine(), "engine": "onnxruntime", "cpu_features": ["avx512_vnni"] if _vnni() else [],
            "budgets": {"latency_p95_ms": 10_000.0, "memory_bytes": 4 << 30},
        }  # fmt: skip
        device_class = DeviceClass.model_validate(
            {"kind": "DeviceClass", "metadata": {"name": "bench"}, "spec": fields | spec}
        )
        return compile_version(version, device_class, self.layout, self._toolchains, cache=self._folder / "cache")


def _smaller(figures: Figures) -> float:
    return figures.float_bytes / figures.compiled_bytes


def _vnni() -> bool:
    return "vnni" in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")


def classifier(bench: Bench) -> list[Row]:
    version, rows = bench.subject(subjects.lite0), []
    for engine in bench.engines:
        got = bench.run(version, engine, 0.97)
        name, peer = f"EfficientNet-Lite0 on {engine}", PEER_NAMES[engine]
        rows += [
            Row(f"{name}: times smaller", _smaller(got.ours), "x", 3.7, peer, _smaller(got.peer), at_least=True),
            Row(f"{name}: agreement", got.ours.agreement or 0, "share", 0.97, peer, got.peer.agreement, at_least=True),
            Row(f"{name}: speed", got.speed(got.ours), "x", 1.8, peer, got.speed(got.peer), at_least=True),
        ]
    return rows


def detector(bench: Bench) -> list[Row]:
    version, rows = bench.subject(subjects.yolov3_tiny), []
    for engine in bench.engines:
        got = bench.run(version, engine, 0.97)
        name, peer = f"YOLOv3-tiny on {engine}", PEER_NAMES[engine]
        for share in ("box_recall", "box_precision"):
            mine, other = got.ours.shares[share].value, got.peer.shares[share].value
            rows.append(Row(f"{name}: {share.replace('_', ' ')}", mine, "share", 0.97, peer, other, at_least=True))
        rows.append(Row(f"{name}: speed", got.speed(got.ours), "x", 2.7, peer, got.speed(got.peer), at_least=True))
    return rows


def hard_to_speed_up(bench: Bench) -> list[Row]:
    """Met by the speed, or by shipping float and saying why."""
    version, rows = bench.subject(subjects.mobilenet_v3_large), []
    for engine in bench.engines:
        got = bench.run(version, engine, 0.01)  # random weights: any answers will do
        name = f"MobileNetV3-L shape on {engine}: speed of the {got.precision} shipped"
        goal = 1.7 if got.precision == "int8" else None
        rows.append(Row(name, got.speed(got.ours), "x", goal, PEER_NAMES[engine], got.speed(got.peer), at_least=True))
    return rows


def broken(bench: Bench) -> list[Row]:
    rows = []
    for make in (subjects.text_reader, subjects.unlike_channels):
        version = bench.subject(make)
        got = bench.run(version, "onnxruntime", 0.9, prefer="size")
        lost, left = (1 - (f.agreement or 0) for f in (got.peer, got.ours))
        name, peer = f"{version.model} on onnxruntime", PEER_NAMES["onnxruntime"]
        bytes_ratio = got.ours.compiled_bytes / got.peer.compiled_bytes
        rows += [
            Row(
                f"{name}: agreement ({got.precision})",
                got.ours.agreement or 0,
                "share",
                0.9,
                peer,
                got.peer.agreement,
                at_least=True,
            ),
            Row(f"{name}: of the loss won back", (lost - left) / lost if lost else 1.0, "share", 0.5, at_least=True),
            Row(f"{name}: bytes against plain int8", bytes_ratio, "x", 1.3),
        ]
        if "accuracy" in got.ours.shares:
            truth = got.ours.shares["float_accuracy"].value
            rows.append(Row(f"{name}: lines right (float {truth:.3f})", got.ours.shares["accuracy"].value, "share", None,
                            peer, got.peer.shares["accuracy"].value))  # fmt: skip
    return rows


def pruned(bench: Bench) -> list[Row]:
    """Against the float network as a file, and as an artifact that is sent the same way. Accuracy over the 10,000 test pictures."""
    version = bench.subject(subjects.fashion)
    size = {"effort": bench.effort, "prefer": "transfer"}
    small = bench.ship(version, accuracy={"min_agreement": 0.85, "max_loss": 0.003}, search=size)
    plain = bench.ship(
        version, accuracy={"min_agreement": 0.85}, search={"effort": "fixed", "prefer": "size", "pruned": False}
    )
    exact = bench.ship(version, precision="fp32", search={"pruned": False})
    print(f"  fashion: {small.why}", flush=True)
    for name, one in (("pruned", small), ("plain int8", plain), ("float", exact)):
        f, sent = one.figures, bench.sent_bytes(one.artifact.digest)
        accuracy = f.shares["accuracy"].value if f.shares else f.agreement
        print(
            f"    {name} ({one.recipe}): {accuracy:.4f}, {f.compiled_bytes:,} bytes, {f.wire_bytes:,} sent, artifact {sent:,} sent, {f.p50_ms:.3f} ms"
        )
    right = small.figures.shares
    lost = 100 * (right["float_accuracy"].value - right["accuracy"].value)
    dense = 100 * (plain.figures.shares["float_accuracy"].value - plain.figures.shares["accuracy"].value)
    whole = bench.sent_bytes(exact.artifact.digest)
    name = "Fashion-MNIST CNN, pruned + int8"
    f, p = small.figures, plain.figures
    assert f.p50_ms
    assert f.float_p50_ms
    return [
        Row(f"{name}: fewer bytes sent than the float file has", f.float_bytes / f.wire_bytes, "x", 10, "the same, not pruned",
            p.float_bytes / p.wire_bytes, at_least=True),
        Row(f"{name}: fewer bytes of the whole artifact, float sent packed too", whole / bench.sent_bytes(small.artifact.digest), "x", None,
            "the same, not pruned", whole / bench.sent_bytes(plain.artifact.digest), at_least=True),
        Row(f"{name}: accuracy lost", lost, "points", 0.3, "the same, not pruned", dense),
        Row(f"{name}: speed", f.float_p50_ms / f.p50_ms, "x", None, "the same, not pruned", (p.float_p50_ms or 0) / (p.p50_ms or 1), at_least=True),
    ]  # fmt: skip


PARTS = {"classifier": classifier, "detector": detector, "hard": hard_to_speed_up, "broken": broken, "pruned": pruned}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=sorted(PARTS), action="append", help="these parts only")
    parser.add_argument("--engine", choices=sorted(PEERS), help="this engine only")
    parser.add_argument("--effort", choices=("fixed", "quick", "full"), default="full")
    parser.add_argument("--folder", type=Path, help="keep subjects and compiled models there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="edgefleet-bench-") as temporary:
        engines = tuple(e for e in PEERS if given.engine in (None, e))
        bench = Bench(given.folder or Path(temporary), given.effort, engines)
        rows = [row for name, part in PARTS.items() if not given.only or name in given.only for row in part(bench)]
    finish("compile", rows)


if __name__ == "__main__":
    main()
