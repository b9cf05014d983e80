"""Output folders: written, locked, opened again, and taken up after an interruption."""
