"""The flows: the one place that knows both the model and the store, and talks to the world."""
