"""Conversations for the built-in model, split into training and test by hash, and their marking over HTTP."""
