"""Backbone, scalar head, adapters, and the scoring contract saved with them."""
