"""`place-kv`: the pass, what a GPU has room for, and what it tells."""
