"""Normalizer-free CNNs in PyTorch."""
