"""What the commands `train`, `eval` and `compare` show."""
