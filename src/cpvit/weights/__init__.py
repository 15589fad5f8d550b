"""Where models come from and go to: creating, reading checkpoints, saving and loading."""
