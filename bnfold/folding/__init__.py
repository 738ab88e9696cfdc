"""Where the affine maps of a network go: a search over the rules of the algebra, and the plan that comes of it."""
