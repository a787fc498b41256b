"""Who may do what, and how much of it: API keys, callers and quotas. Knows no HTTP."""
