"""Evaluate a CIFAR checkpoint dense and pruned, with the command line of the original CP-ViT code.

    python3 eval.py --name="CP-ViT test" --dataset="cifar10" --model_type="ViT-B_16" \\
        --pretrained_dir='output/cifar10_checkpoint.pth' --eval_batch_size=64 --data_dir=data
"""

import sys

from cpvit.commands.cli import run_cli
from cpvit.commands.original import run_eval

if __name__ == "__main__":
    sys.exit(run_cli(run_eval, sys.argv[1:], prog="eval.py"))
