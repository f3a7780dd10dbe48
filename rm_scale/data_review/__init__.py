"""Examine preference data before anything is trained on it: lengths, doubtful labels, biases, languages."""
