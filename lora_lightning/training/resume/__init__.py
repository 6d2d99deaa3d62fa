"""A resumed run goes on exactly: random numbers, data position, loops."""
