"""The packed row: its layout, its attention backends, and the index arrays they read."""
