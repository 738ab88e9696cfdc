"""Writing a plan into modules and programs."""
