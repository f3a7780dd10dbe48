"""Score texts and files with a saved reward model."""
