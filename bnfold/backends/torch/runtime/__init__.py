"""Running an exported program, as it is and in float64."""
