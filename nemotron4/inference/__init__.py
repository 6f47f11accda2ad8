"""From prompts to tokens: sampling, scheduling and the engine."""

# Of keys and values that ended requests leave for prompts that begin like theirs.
PREFIX_CACHE_GB = 0.25

# Guessed at once where an answer repeats itself or its prompt. Of the demo model a step of two rows takes
# 1.24 times as long as one of one, of three 1.8, of eight 3.7: only copies of texts gain by more guesses.
NUM_SPECULATIVE_TOKENS = 1
