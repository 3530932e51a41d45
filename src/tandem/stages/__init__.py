"""The stages, each a file that reads from top to bottom as the algorithm."""
