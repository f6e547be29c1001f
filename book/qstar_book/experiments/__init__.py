"""What the chapters on evidence train and score: generated tasks, small models, adapters, pairs."""

from qstar import _quiet  # noqa: F401 - before transformers
