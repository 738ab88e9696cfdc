"""The options of the commands, and what their values mean."""
