"""The records that a training run leaves behind, its model card and its page."""
