"""Pictures and progress."""
