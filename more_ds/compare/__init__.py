"""Result files side by side: bootstrap, pairs, published numbers, tables."""
