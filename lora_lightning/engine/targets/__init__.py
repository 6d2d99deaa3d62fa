"""Which modules a config asks for."""
