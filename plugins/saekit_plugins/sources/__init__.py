"""Activation sources."""
