"""Attacks on a model and what came of them: garak, AEGIS, and people's sessions."""
