"""Models in the forms that emitters write, opened and run."""
