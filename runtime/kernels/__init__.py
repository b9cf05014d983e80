"""Kernels an artifact carries. Each file holds one, for all forms; what a form does not need is
cut out of it when it is emitted."""
