"""Files and folders: what they may be called, and how they are there whole or not at all."""
