"""Weights, activations and KV caches in few bits."""
