"""Tensor parallelism: a program on several devices."""
