"""Speed, as ratios inside one process."""
