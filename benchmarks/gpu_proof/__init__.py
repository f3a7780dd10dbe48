"""`make gpu-proof`: what a machine with CUDA must show, in twelve minutes, each step in a process of its own."""
