"""Small networks of the shapes that people bring, with random weights, over an input of 1 x 3 x 32 x 32; each gives its output's shape."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from support.networks import Net


def mobilenet_v3(net: Net) -> list[int]:
    """Hard swish written out and whole, squeeze and excite with a hard sigmoid, a shortcut."""
    net.conv(3, 16, stride=2)
    trunk = net.last
    net.add("Add", net.constant(np.float32(3)))
    net.relu6()
    net.add("Mul", trunk)
    shortcut = net.add("Div", net.constant(np.float32(6)))
    net.conv(16, 16, group=16)
    net.add("HardSwish")
    excited = net.last
    net.add("ReduceMean", axes=[2, 3], keepdims=1)
    net.conv(16, 8, 1)
    net.add("Relu")
    net.conv(8, 16, 1)
    net.add("HardSigmoid", alpha=1 / 6, beta=0.5)
    net.add("Mul", excited)
    net.conv(16, 16, 1)
    net.add("Add", shortcut)
    trunk = net.last
    net.add("HardSigmoid", alpha=1 / 6, beta=0.5)
    net.add("Mul", trunk)
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.dense(16, 10)
    return [1, 10]


def resnet(net: Net) -> list[int]:
    """Pads that are the same on both sides at stride 2, as PyTorch writes them."""
    net.conv(3, 8, 7, stride=2, pads=[3, 3, 3, 3])
    net.add("Relu")
    shortcut = net.add("MaxPool", kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1])
    net.conv(8, 16, stride=2, pads=[1, 1, 1, 1])
    net.add("Relu")
    net.conv(16, 16)
    deep = net.last
    net.last = shortcut
    net.conv(8, 16, 1, stride=2)
    net.add("Add", deep)
    net.add("Relu")
    net.add("GlobalAveragePool")
    net.add("Flatten")
    net.dense(16, 10)
    return [1, 10]


def segmentation(net: Net, *, where: str = "half_pixel") -> list[int]:
    """Down, up by a bilinear resize and by a transposed convolution, and a softmax over the channels."""
    net.conv(3, 8, stride=2)
    wide = net.add("Relu")
    net.conv(8, 8, stride=2)
    net.add("Relu")
    nothing = net.constant(np.zeros(0, np.float32))
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    net.add("Resize", nothing, scales, mode="linear", coordinate_transformation_mode=where)
    net.add("Concat", wide, axis=1)
    weight = net.constant(net.rng.normal(size=(16, 5, 4, 4)).astype(np.float32) * 0.1)
    net.add("ConvTranspose", weight, kernel_shape=[4, 4], strides=[2, 2], pads=[1, 1, 1, 1])
    net.add("Softmax", axis=1)
    return [1, 5, 32, 32]


def corners(net: Net) -> list[int]:
    return segmentation(net, where="align_corners")


def shufflenet(net: Net) -> list[int]:
    """Split, grouped convolutions, and the shuffle of channels by reshape, transpose, reshape."""
    net.conv(3, 16, stride=2)
    net.add("Relu")
    net.add("Split", axis=1)
    left = net.last
    right = f"{left}_right"
    net.nodes[-1].output.append(right)
    net.last = right
    net.conv(8, 8, group=2)
    net.add("Relu")
    net.conv(8, 8, group=8)
    net.add("Concat", left, axis=1)
    net.add("Reshape", net.constant(np.array([1, 2, 8, 16, 16], np.int64)))
    net.add("Transpose", perm=[0, 2, 1, 3, 4])
    net.add("Reshape", net.constant(np.array([1, 16, 16, 16], np.int64)))
    net.conv(16, 8, 1)
    net.add("GlobalAveragePool")
    net.add("Reshape", net.constant(np.array([0, -1], np.int64)))
    net.dense(8, 10)
    return [1, 10]


def yolo_head(net: Net) -> list[int]:
    """Leaky relus, a nearest upsample and concat, and the head's reshape and transpose into boxes."""
    net.conv(3, 8, stride=2)
    fine = net.add("LeakyRelu", alpha=0.1)
    net.add("MaxPool", kernel_shape=[2, 2], strides=[2, 2])
    net.conv(8, 8)
    net.add("LeakyRelu", alpha=0.1)
    nothing = net.constant(np.zeros(0, np.float32))
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    net.add(
        "Resize", nothing, scales, mode="nearest", nearest_mode="floor", coordinate_transformation_mode="asymmetric"
    )
    net.add("Concat", fine, axis=1)
    net.conv(16, 21, 1)
    net.add("Reshape", net.constant(np.array([1, 3, 7, 16, 16], np.int64)))
    net.add("Transpose", perm=[0, 1, 3, 4, 2])
    net.add("Sigmoid")
    net.add("Reshape", net.constant(np.array([1, -1, 7], np.int64)))
    return [1, 768, 7]


def recogniser(net: Net) -> list[int]:
    """A sequence read off a picture: pieces of a layer normalisation, attention by matrix products, softmax."""
    net.conv(3, 8, stride=2)
    net.add("ReduceMean", axes=[2], keepdims=1)
    net.add("Squeeze", net.constant(np.array([2], np.int64)))
    x = net.add("Transpose", perm=[0, 2, 1])
    mean = net.add("ReduceMean", axes=[-1], keepdims=1)
    apart = net.add("Sub", mean, first=x)
    net.add("Pow", net.constant(np.float32(2)))
    net.add("ReduceMean", axes=[-1], keepdims=1)
    net.add("Add", net.constant(np.float32(1e-5)))
    root = net.add("Sqrt")
    x = net.add("Div", root, first=apart)
    weights = [net.constant(net.rng.normal(size=(8, 8)).astype(np.float32) * 0.3) for _ in range(2)]
    query = net.add("MatMul", weights[0], first=x)
    net.add("MatMul", weights[1], first=x)
    key = net.add("Transpose", perm=[0, 2, 1])
    net.add("MatMul", key, first=query)
    net.add("Softmax", axis=-1)
    net.add("MatMul", x)
    net.add("Add", x)
    return [1, 16, 8]


# How many TRANSPOSE each needs: one at the picture that comes in, and where the order truly has to change.
NETWORKS: dict[Callable[[Net], list[int]], int] = {
    mobilenet_v3: 1,
    resnet: 1,
    segmentation: 2,  # and at the picture that goes out
    corners: 2,
    shufflenet: 2,  # and the shuffle itself
    yolo_head: 2,  # and the boxes: their anchors lie beside the channels
    recogniser: 1,
}
