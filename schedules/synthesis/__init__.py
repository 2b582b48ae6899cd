"""Orders of actions that are made for given times and memory."""
