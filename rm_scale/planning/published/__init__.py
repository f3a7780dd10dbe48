"""Predict published measurements, row by row (`rm-scale plan --cases`)."""
