"""The technical report's human evaluation as a study: blind, in random order, on a 6-point scale."""
