"""What is measured once, written down with its provenance, and read by the chapters."""
