"""What each kind of plugin promises, as checks: a file per kind, of the kind's name."""
