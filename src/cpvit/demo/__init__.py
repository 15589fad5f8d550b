"""A demonstration without a download: a small Vision Transformer that comes with the package, and its images."""

from cpvit.demo.digits import cluttered_digits, digits_model, load_digits_model
from cpvit.demo.run import DemoResult, describe, run_demo

__all__ = [
    "DemoResult",
    "cluttered_digits",
    "describe",
    "digits_model",
    "load_digits_model",
    "run_demo",
]
