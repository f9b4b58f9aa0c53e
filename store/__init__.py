"""The artifact store: immutable records, files under their SHA-256, and DuckDB as an index over them."""
