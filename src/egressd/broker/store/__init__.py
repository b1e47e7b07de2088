"""EFFECTS: memberships, sources, documents, barriers, in SQLite or PostgreSQL; the only way to change it."""
