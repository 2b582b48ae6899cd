"""What would it cost? Seconds and bytes of ops, collectives and timelines, as pure functions."""
