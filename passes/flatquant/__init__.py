"""Transforms that are trained so that weights, activations and KV caches fit few bits."""
