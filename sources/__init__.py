"""Where records come from: files (records.py says how a new format is added) and built-in tasks."""
