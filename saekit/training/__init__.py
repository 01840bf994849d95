"""The loop and what it is made of; :func:`saekit.train` is the way in."""
