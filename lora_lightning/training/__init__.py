"""The adapters' life inside Lightning: everything that knows the Trainer, one idea a file."""
