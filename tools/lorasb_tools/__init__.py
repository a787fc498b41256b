"""The `lorasb` command: each file parses flags, makes one runtime call and reports."""
