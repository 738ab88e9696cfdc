"""ONNX operators as nodes of the neutral graph."""
