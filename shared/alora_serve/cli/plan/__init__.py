"""``alora-serve plan``: how much memory, how many processes and what price a load takes."""
