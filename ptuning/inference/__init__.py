"""Generation and label choice with many soft prompts over one base."""
