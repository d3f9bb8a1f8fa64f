"""Fast pieces with explicit backward. Each has a slow twin of the same signature in `reference.py`."""
