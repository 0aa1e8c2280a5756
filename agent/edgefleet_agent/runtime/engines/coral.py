"""Engine adapter: receives a .tflite file that edgetpu_compiler made, hands on a TFLite session with Google's Edge TPU delegate.

The compiler leaves what the Edge TPU lacks, and a file that it never saw altogether, to the CPU, and the interpreter runs that
without a word; so :attr:`TfliteSession.providers` names the CPU whenever an operator is left to it, other than the conversions at the edges.
Proven against the recorded interface of ``load_delegate`` and of the interpreter's operator list, not on a board.
Source: coral.ai, "Run inference on the Edge TPU with Python"; LiteRT's ``Interpreter``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgefleet_shared.artifact import ModelConfig
from edgefleet_shared.errors import EngineError

from edgefleet_agent.runtime.engines.tflite import TfliteEngine, TfliteSession, interpreter_of

DELEGATE = "libedgetpu.so.1"
_ON_TPU = ("edgetpu-custom-op", "EdgeTpuDelegateForCustomOp")
# What turns float into int8 and back at a file's edges is the CPU's in every file. Inside it would have an operator in float between, which counts.
_CONVERSIONS = ("QUANTIZE", "DEQUANTIZE")


class CoralEngine:
    name = "coral"

    def __init__(self) -> None:
        self._tflite = TfliteEngine()

    def available(self) -> str | None:
        # Whether a device answers is known only by loading its delegate, which the agent's probe does in a child.
        return self._tflite.available()

    def missing(self) -> str:
        return self._tflite.missing()

    def load_library(self) -> tuple[Any, Any]:
        """The interpreter's module, and the delegate of the device."""
        library = self._tflite.load_library()
        try:
            return library, library.load_delegate(DELEGATE)
        except (OSError, ValueError) as exc:
            raise EngineError(
                f"no Edge TPU answers: {exc}",
                hint=f"is {DELEGATE} installed, the device plugged in, and its device file open to the runtime?",
            ) from exc

    def load(self, path: Path, config: ModelConfig, threads: int) -> TfliteSession:
        library, delegate = self.load_library()
        interpreter = interpreter_of(library, path, threads, (delegate,))
        return TfliteSession(interpreter, config, _providers(interpreter))


def _providers(interpreter: Any) -> tuple[str, ...]:
    operators = [str(operator["op_name"]) for operator in interpreter._get_ops_details()]
    on_tpu = [name for name in operators if name in _ON_TPU]
    elsewhere = [name for name in operators if name not in (*_ON_TPU, *_CONVERSIONS)]
    found = (("EdgeTPU", bool(on_tpu)), ("CPU", bool(elsewhere) or not on_tpu))
    return tuple(name for name, used in found if used)
