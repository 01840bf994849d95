"""What each command is called with and what it prints: a file for each.  Nothing here is heavy before it is called."""
