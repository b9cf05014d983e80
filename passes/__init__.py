"""Passes: one transformation a file, which registers it; nothing else names it.

The entry point group `graphopt.passes` names this package, and a package or module of any other
distribution that has passes.
"""
