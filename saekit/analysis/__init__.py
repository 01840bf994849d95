"""Looking at trained SAEs."""
