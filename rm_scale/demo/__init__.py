"""What to try things with: generated preferences, small models, random weights of true shape, and `make demo`."""
