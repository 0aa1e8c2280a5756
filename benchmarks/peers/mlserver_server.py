"""MLServer with one ONNX model, over gRPC. Runs in its own environment: FOLDER MODEL GRPC_PORT HTTP_PORT METRICS_PORT."""

import asyncio
import sys
from pathlib import Path

import onnxruntime
from mlserver import MLModel, MLServer, ModelSettings, Settings
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse


class Onnx(MLModel):
    async def load(self) -> bool:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        (y,) = self.session.run(["y"], {"x": NumpyCodec.decode_input(payload.inputs[0])})
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("y", y)])


async def main() -> None:
    folder, model, grpc_port, http_port, metrics_port = sys.argv[1:6]
    settings = Settings(
        grpc_port=int(grpc_port), http_port=int(http_port), metrics_port=int(metrics_port), host="127.0.0.1",
        parallel_workers=0, load_models_at_startup=False, debug=False,
    )  # fmt: skip
    server = MLServer(settings)
    one = ModelSettings(name=model, implementation=Onnx, parameters={"uri": str(Path(folder, "model.onnx"))})
    await server.start([one])


if __name__ == "__main__":
    asyncio.run(main())
