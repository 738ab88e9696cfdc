"""ONNX files: what they hold, whether it is sound, reading and writing them."""
