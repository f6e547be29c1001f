"""What the chapters on evidence train and score: generated tasks, small models, adapters, pairs."""
