"""Numerical problems that passes pose."""
