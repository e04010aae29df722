"""A run as one HTML page: what its files say, drawn."""
