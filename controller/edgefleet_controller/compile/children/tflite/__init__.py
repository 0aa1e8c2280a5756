"""Stage 2, compile: ONNX to .tflite without TensorFlow. :mod:`.onnx_to_tflite` is the way in, :mod:`.writer` walks the graph, one module a kind of operator."""
