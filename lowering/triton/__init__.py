"""Attention and its neighbours as Triton source."""
