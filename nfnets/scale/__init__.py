"""One engine that sets the scale of what layers put out, in one forward pass."""
