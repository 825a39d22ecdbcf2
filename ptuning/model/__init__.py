"""The frozen base, soft prompts, and one forward pass over packed rows."""
