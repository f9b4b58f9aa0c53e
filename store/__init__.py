"""The artifact store: immutable records, files under their SHA-256, and an index over both."""
