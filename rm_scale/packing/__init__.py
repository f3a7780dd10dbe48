"""The batch stays, only its layout changes: which groups make a step, and how their tokens lie in rows."""
