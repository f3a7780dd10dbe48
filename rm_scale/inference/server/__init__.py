"""The HTTP server: what comes in, how it waits, how it is batched, what is counted. Needs the extra rm-scale[serve]."""
