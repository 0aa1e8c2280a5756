"""Stage 2, compile: TensorRT-RTX. Builds engines ahead of time for named GPUs, on a machine without one.

The network goes in as for TensorRT (:mod:`.tensorrt`): its types say each layer's precision. The engine holds kernels for the compute
capabilities that are asked for; the last compilation happens on the board. It can't be run here: onnxruntime answers to the typed network in
its place. Source: TensorRT-RTX's developer guide, ahead-of-time compilation.
"""

from __future__ import annotations

import sys
from typing import Any

import tensorrt_rtx_bindings as trt

from . import job
from .measure import measure
from .tensorrt import stand_in, typed


def compile_model(request: job.Request, progress: job.Progress) -> dict[str, Any]:
    """Request: ``options`` (``capabilities``, such as ``8.6,8.9``; ``workspace_mb``), ``jobs`` (each ``recipe``, ``network``, ``compiled``,
    ``stand_in``)."""
    for number, one in enumerate(request["jobs"]):
        progress("building engines", number, len(request["jobs"]))
        typed(one["network"], one["stand_in"], one["recipe"]["precision"])
        content = _built(one["stand_in"], request["options"])
        with open(one["compiled"], "wb") as stream:
            stream.write(content)
    progress("building engines", len(request["jobs"]), len(request["jobs"]))
    return {}


class _Log(trt.ILogger):  # type: ignore[misc]
    """Errors are kept for the message, all else goes to the log."""

    def __init__(self) -> None:
        super().__init__()
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        sys.stderr.write(f"{severity}: {message}\n")
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self.errors.append(message)


def _built(network: str, options: dict[str, Any]) -> bytes:
    log = _Log()
    builder = trt.Builder(log)
    definition = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(definition, log)
    if not parser.parse_from_file(network):
        raise _refusal(parser)
    config = builder.create_builder_config()
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options["workspace_mb"]) << 20)
    capabilities = [
        getattr(trt.ComputeCapability, f"SM{c.replace('.', '')}", None) for c in options["capabilities"].split(",")
    ]
    if None in capabilities:
        raise job.Refused("bad_manifest", f"tensorrt-rtx builds for no GPU of capability {options['capabilities']}")
    config.num_compute_capabilities = len(capabilities)
    for place, capability in enumerate(capabilities):
        config.set_compute_capability(capability, place)
    engine = builder.build_serialized_network(definition, config)
    if engine is None:
        raise job.Refused(
            "toolchain_failed", f"tensorrt-rtx built no engine: {log.errors[0][:400] if log.errors else 'see the log'}"
        )
    return bytes(engine)


def _refusal(parser: Any) -> job.Refused:
    """The parser's first complaint, with operator and node."""
    if not parser.num_errors:
        return job.Refused("bad_model", "tensorrt-rtx can't parse this network; the log says why")
    first = parser.get_error(0)
    return job.Refused(
        "bad_model",
        f"tensorrt-rtx can't take the operator {first.node_operator()} (node {first.node_name()!r}): {first.desc()[:300]}",
    )


def main() -> None:
    job.serve({"compile": compile_model, "measure": lambda r, p: measure(stand_in, r, p)})
