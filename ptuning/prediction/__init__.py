"""Tables through soft prompts: rows are read, answered by engines on Ray, and written with their answers."""
