"""The connection to Ray, jobs on a cluster, checks of its nodes."""
