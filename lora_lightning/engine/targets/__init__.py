"""Selection of the modules that a config asks for."""
