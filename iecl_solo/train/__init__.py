"""A run: its configuration completed, trained, its folder and its logs."""
