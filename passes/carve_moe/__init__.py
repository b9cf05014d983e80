"""`carve-moe`: the pass, how neurons are divided, how it runs, and what it tells."""
