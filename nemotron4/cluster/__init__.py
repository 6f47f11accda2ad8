"""What hardware a model needs, and the scripts that start it there. No torch."""
