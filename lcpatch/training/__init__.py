"""Training with long contexts."""
