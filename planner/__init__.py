"""What is best? The joint search over meshes, placements, stages, schedules and memory, with its certificate."""
