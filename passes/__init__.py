"""How does the graph become that? FX graph in, FX graph out."""
