"""From prompts to tokens: sampling, scheduling and the engine."""

# Of keys and values that ended requests leave for prompts that begin like theirs.
PREFIX_CACHE_GB = 0.25
