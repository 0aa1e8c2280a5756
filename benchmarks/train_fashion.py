"""Trains the small network that ``compile.py`` prunes; run in the pruning toolchain's environment, once.

``python train_fashion.py TRAINING NETWORK``: safetensors with ``pictures`` (uint8, N x 28 x 28) and ``labels`` (uint8, N), and the ONNX file to write.
Four convolutions, 61 thousand weights, five epochs: what a user would call good enough, not the best there is. Batch normalisation is folded
into the convolutions. Seeded, one thread.
"""

from __future__ import annotations

import sys
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file
from torch import nn
from torch.nn import functional

LAYERS = ((1, 16, 2), (16, 32, 1), (32, 64, 2), (64, 64, 1))  # inputs, outputs, stride
EPOCHS, BATCH, RATE = 5, 256, 3e-3


class Net(nn.Module):  # type: ignore[misc]  # untyped
    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(i, o, 3, s, 1, bias=False) for i, o, s in LAYERS)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _ in LAYERS)
        self.dropout, self.dense = nn.Dropout(0.2), nn.Linear(64, 10)

    def forward(self, x: Any) -> Any:
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = functional.relu(norm(convolution(x)))
        return self.dense(self.dropout(x.mean((2, 3))))


def train(net: Net, pictures: Any, labels: Any) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=RATE, weight_decay=1e-4)
    steps = len(pictures) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
    net.train()
    for _ in range(EPOCHS):
        order = torch.randperm(len(pictures))
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            x = pictures[rows].unsqueeze(1).float() / 255
            loss = functional.cross_entropy(net(x.flip(3) if step % 2 else x), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def as_onnx(net: Net) -> onnx.ModelProto:
    """``image`` (N x 1 x 28 x 28, ``u8 / 255``) to ``logits`` (N x 10)."""
    nodes, constants, last = [], [], "image"

    def constant(name: str, values: Any) -> str:
        constants.append(numpy_helper.from_array(values.detach().float().numpy(), name))
        return name

    for number, (convolution, norm) in enumerate(zip(net.convolutions, net.norms, strict=True)):
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = constant(f"w{number}", convolution.weight * scale[:, None, None, None])
        bias = constant(f"b{number}", norm.bias - norm.running_mean * scale)
        side = convolution.stride[0]
        nodes.append(helper.make_node("Conv", [last, weight, bias], [f"conv{number}"], name=f"conv{number}",
                                      kernel_shape=[3, 3], strides=[side, side], pads=[1, 1, 1, 1]))  # fmt: skip
        nodes.append(helper.make_node("Relu", [f"conv{number}"], [f"relu{number}"], name=f"relu{number}"))
        last = f"relu{number}"
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["pool"], name="pool"))
    nodes.append(helper.make_node("Flatten", ["pool"], ["features"], name="features"))
    dense = [constant("w", net.dense.weight), constant("b", net.dense.bias)]
    nodes.append(helper.make_node("Gemm", ["features", *dense], ["logits"], name="dense", transB=1))
    graph = helper.make_graph(
        nodes, "fashion", [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["N", 1, 28, 28])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 10])], constants,
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    return model


def main() -> None:
    training, network = sys.argv[1:]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tensors = load_file(training)
    net = Net()
    train(net, torch.from_numpy(tensors["pictures"]), torch.from_numpy(tensors["labels"]).long())
    net.eval()
    onnx.save(as_onnx(net), network)


if __name__ == "__main__":
    main()
