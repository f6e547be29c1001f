"""Bounds, mixtures, testing and sequences: what is known of q* beyond its definition."""
