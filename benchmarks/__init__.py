"""Measurements: speed and memory beside a plain implementation; known answers."""
