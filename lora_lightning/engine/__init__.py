"""Put adapters on a model, choose which act, merge them, take them off."""
