"""What a run needs before it is submitted: memory, time, and the configuration that fits."""
