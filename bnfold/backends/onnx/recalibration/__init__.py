"""Lockstep over an ONNX graph."""
