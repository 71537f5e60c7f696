"""Experiments in the plane."""
