"""From one device to many machines: how adapters live under each of Lightning's strategies."""
