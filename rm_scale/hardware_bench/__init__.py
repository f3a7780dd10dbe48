"""Measure this machine in the figures by which the planner describes a device."""
