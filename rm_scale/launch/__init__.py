"""Starting runs: the guard around entry points, and the demo."""
