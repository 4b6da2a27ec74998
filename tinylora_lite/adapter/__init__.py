"""The adapter: settings, tying, projection, SVD, and the hook that adds the update."""
