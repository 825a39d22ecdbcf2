"""What fits into memory and how long it takes, by arithmetic."""
