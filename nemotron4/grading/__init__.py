"""Pure functions that judge a reply: value or reason, no I/O, no model, no torch."""
