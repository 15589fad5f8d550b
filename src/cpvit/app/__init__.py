"""A page on this machine that shows what a pruned model does to an image. Everything but the page works without it."""
