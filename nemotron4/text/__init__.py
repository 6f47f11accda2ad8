"""Vocabularies, prompt formats and loss masks. Plain text in, ids out; no torch."""
