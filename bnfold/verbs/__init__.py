"""Verbs made of others, or beside them."""
