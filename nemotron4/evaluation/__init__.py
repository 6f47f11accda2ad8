"""The card's benchmarks by their exact definitions: data, prompts, decoding, scores, runs and reports."""
