"""Finetune a pruned model, with the command line of the original CP-ViT code."""

import sys

from cpvit.commands.cli import run_cli
from cpvit.commands.original import run_train

if __name__ == "__main__":
    sys.exit(run_cli(run_train, sys.argv[1:], prog="train.py"))
