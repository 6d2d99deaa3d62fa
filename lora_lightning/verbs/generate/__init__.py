"""The verb `generate`: text from a trained run, once or as a chat in the terminal."""
