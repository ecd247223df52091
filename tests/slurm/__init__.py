"""A SLURM of two nodes on this machine, and what is tried on it."""
