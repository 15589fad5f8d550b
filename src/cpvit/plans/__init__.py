"""Values and arithmetic: what is asked for, what is done, and what it costs. Nothing is run here."""
