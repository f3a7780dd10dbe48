"""Which groups make an optimizer step, how ranks and micro-steps share them, and how their tokens lie in rows."""
