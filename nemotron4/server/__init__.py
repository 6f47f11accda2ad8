"""The HTTP server: the NeMo contract, the OpenAI routes, metrics."""
