"""The training loop on the workers, and the run on the driver."""
