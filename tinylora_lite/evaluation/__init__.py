"""How often a model is right, and how sure of that we are."""
