"""How a model is run for others."""
