"""The version of saekit."""

__version__ = "0.3.0"
