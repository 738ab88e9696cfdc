"""Exported programs: how they come about, and what they say of a module."""
