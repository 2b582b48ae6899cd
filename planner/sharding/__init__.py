"""Where does each tensor lie? Strategies for each op, and the solver that chooses among them."""
