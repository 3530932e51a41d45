"""Processes over a Ray cluster: where they stand, how work reaches them, and what becomes of those that die."""
