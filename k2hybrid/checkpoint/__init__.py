"""Checkpoints in the published layout: read strictly, mapped in place, synthesized at any size."""
