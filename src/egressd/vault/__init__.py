"""EFFECTS: documents on disk. Opening them beneath their source's directory, copying exactly what was
ingested into a directory of one request, and making sure that nothing of it stays."""
