"""Training as a service: files, jobs and batches that outlive every process."""
