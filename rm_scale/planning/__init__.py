"""What will run: pure arithmetic over the run's settings, the model's shape and the machine. Imports no torch."""
