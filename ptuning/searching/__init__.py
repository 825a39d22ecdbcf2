"""The search: Ray Tune trials in slots of running worker groups."""
