"""Training parts of a program towards what another program computes."""
