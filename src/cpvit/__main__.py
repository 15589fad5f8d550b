"""``python -m cpvit`` is ``cpvit``."""

from cpvit.commands.cli import entry_point

if __name__ == "__main__":
    entry_point()
