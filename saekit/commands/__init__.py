"""What saekit does, one file per command; they know configurations and plugins, the stages do not."""
