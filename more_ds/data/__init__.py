"""From rows of a task to micro-batches: reading, encoding, sampling, collating."""
