"""Pure tensor functions; they import nothing of ours."""
