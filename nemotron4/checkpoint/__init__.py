"""Checkpoints on disk: reading, checking and converting them, tensor by tensor."""
