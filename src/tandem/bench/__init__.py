"""How fast a joint step and decoding are here, against the arithmetic that they need and against other systems."""
