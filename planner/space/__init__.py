"""Which plans are there? Meshes, microbatches and schedules; what the user forces; the links of a mesh."""
