"""The Plan document: what passes and runtime read of a decision. Its text form, its checks, its order of actions."""
