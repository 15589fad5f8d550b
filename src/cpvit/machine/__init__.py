"""This machine: its devices, its files, and how long things take on it."""
