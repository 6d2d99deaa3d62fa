"""`inspect`: what is in a checkpoint or a folder of adapters, without their base."""
