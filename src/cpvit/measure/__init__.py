"""What pruned models cost and save: accuracy, speed, what is supported."""
