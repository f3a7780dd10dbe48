"""Best-of-N: rank the completions of a prompt, choose the best, make preference pairs, draw the curve over n."""
