"""ONNX Runtime: providers, sessions, and which of its optimisations errs."""
