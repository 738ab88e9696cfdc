"""Files of PyTorch: what they hold, reading and writing them."""
