"""Parts of graphopt inside of other libraries' own ways to run a model."""
