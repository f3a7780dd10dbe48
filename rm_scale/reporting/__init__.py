"""What a run leaves behind for people: its records and the model card."""
