"""Loaders of saved SAEs."""
