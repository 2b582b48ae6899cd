"""How is a chain of segments cut into pipeline stages, and what do they cost under ZeRO?"""
