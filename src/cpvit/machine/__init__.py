"""This machine: its devices, and how long things take on it."""
