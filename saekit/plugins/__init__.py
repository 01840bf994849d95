"""The plugin kernel: the hooks, who registered what, and building what a configuration chooses."""
