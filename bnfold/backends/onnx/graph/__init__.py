"""What an ONNX graph says of its values: constants, shapes, ranks, integers, uses."""
