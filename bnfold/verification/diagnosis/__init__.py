"""Where two models differ, and why."""
