"""The generator of the built-in base: its corpus, its tasks, and how it is pretrained. The wheel has the results only."""
