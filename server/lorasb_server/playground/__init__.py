"""The page at `/`: what the server does, seen in a browser."""
