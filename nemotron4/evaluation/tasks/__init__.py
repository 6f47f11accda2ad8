"""One file per benchmark: loader, prompt, decoding, grader, metric."""
