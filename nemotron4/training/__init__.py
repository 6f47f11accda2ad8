"""Alignment: losses, data, packing, the trainer and its stages, and how they are split over processes."""
