"""Files and data sets, tokenised rows, batches."""
