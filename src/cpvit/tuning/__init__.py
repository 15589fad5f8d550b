"""Run pruned models to find a plan: search, targets, speed-ups."""
