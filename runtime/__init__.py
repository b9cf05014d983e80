"""What an emitted artifact needs at run time. Imports torch and nothing of graphopt."""
