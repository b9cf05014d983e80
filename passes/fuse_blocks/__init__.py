"""`fuse-blocks`: the pass, how it runs, FuseGPT's injection, and what it tells."""
