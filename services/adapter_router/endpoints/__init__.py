"""The endpoints of a service: found by name, watched, and leased to requests."""
