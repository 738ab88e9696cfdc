"""PyTorch models: modules and exported programs."""
