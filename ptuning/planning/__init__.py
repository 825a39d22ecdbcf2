"""Capacity plans: memory and time of training and serving, by arithmetic."""
