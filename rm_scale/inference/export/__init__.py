"""Export a saved run as one plain folder for other engines, verified."""
