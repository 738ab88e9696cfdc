"""The ONNX back-end: `load` and `save`, `lower`, `write`, `run`."""
