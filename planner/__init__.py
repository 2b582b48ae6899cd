"""What is best? The Plan document, the solvers, the joint search and the explanation."""
