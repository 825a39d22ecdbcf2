"""MLflow runs: the recorder, the outbox on the local disk, the uploader, plots."""
