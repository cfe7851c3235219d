"""What may leave the building of a run, and what may not."""
