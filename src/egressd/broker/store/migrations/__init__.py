"""How the store's tables came to be, one file for each change: alembic's."""
