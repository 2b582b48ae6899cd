"""Which candidate is best, and how good is it provably?"""
