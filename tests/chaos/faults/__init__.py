"""What is broken, and what clients see of it."""
