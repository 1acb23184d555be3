"""What a traced network is made of: norm layers and their surroundings, residual branches, heads."""
