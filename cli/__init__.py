"""What surrounds a run: its flags and their checks, the memory plan, the report."""
