"""Methods that are whole, one a module; and, by name (so that they pickle), the classes that the
registry generates."""
