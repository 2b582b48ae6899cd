"""What does each rank hold, and what trades time for memory?"""
