"""From an adapter's name to a leased device slot: store, loader, slots."""
