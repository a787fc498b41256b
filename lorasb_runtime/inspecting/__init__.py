"""Looking at files: what is in them, how they differ, and pictures of both. Changes nothing."""
