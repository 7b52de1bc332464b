"""The command line ``alora-serve``, and the supervisor that runs every service on one machine. Torch-free."""
