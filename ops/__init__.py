"""How may an op lie on devices? Placements, strategies, and the sharding rules of every op."""
