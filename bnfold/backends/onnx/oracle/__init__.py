"""ONNX operators in float64."""
