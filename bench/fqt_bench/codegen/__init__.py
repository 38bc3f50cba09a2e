"""Compiling every launch without a GPU: the names of the launches, the compiler, and the table of figures."""
