"""The demo: a small chat model learns to be kind about films, with every part of it real."""
