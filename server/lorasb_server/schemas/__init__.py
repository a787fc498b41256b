"""Request bodies. Unknown fields are refused, types are strict, null means the default."""
