"""People's judgments: one store, one page, one set of figures for red-teaming, review and blind studies."""
