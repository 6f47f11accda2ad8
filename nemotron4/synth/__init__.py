"""Synthetic data: a pipeline of model calls that survives kill -9 and whose accounting balance."""
