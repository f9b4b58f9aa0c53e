"""The flows: the only place that knows both the model and the store, and that talks to the world."""
