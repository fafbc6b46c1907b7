"""The method classes that the registry generates, importable by name (so that they pickle)."""
