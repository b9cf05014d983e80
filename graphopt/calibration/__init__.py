"""What is measured on text before a program is changed, and reconstruction by it."""
