"""Latent pages and the prefix tree over them. Layer 2."""
