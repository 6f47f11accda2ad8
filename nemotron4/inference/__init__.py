"""From prompts to tokens: sampling, scheduling and the engine."""
