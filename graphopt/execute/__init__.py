"""Running programs without emitting them."""
