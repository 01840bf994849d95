"""saekit's built-in plugins: one file each, found through the same entry points as anybody's."""
