"""Prune a model in place, look into it, and undo it."""
