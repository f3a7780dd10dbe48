"""Serve a reward model over HTTP: routes, limits, batching, metrics. Needs the extra rm-scale[serve]."""
