"""Training data, gradients, deriving bases, training cores."""
