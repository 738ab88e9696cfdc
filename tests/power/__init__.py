"""How often `verify` passes a defect or takes a right fold for one, measured on real architectures, beside what others use."""
