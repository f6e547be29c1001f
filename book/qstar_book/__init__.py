"""The book's own code: chapters, CI and tests import it, nobody else."""
