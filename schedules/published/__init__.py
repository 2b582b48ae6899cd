"""Orders of actions as papers give them."""
