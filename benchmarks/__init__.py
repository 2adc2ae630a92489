"""Measurements anybody can repeat; README.md says how, and what they gave."""
