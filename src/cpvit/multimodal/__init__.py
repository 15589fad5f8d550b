"""Vision-language models: the image tower is pruned, and the text model reads fewer image tokens."""
