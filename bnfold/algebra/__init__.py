"""The idea: a BatchNorm is an affine map per channel, and affine maps can move through a network. Here is what moves, and by what rules."""
