"""Lockstep over an exported program."""
