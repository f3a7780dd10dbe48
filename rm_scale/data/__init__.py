"""Any preference file in, checked groups of token sequences out; nothing is dropped silently."""
