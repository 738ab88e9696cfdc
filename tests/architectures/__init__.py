"""Real architectures through every route: how many BatchNorms stay, why, and how exact the rest is."""
