"""Real training of candidates: two builders of one function, and what trains it.

network (what a builder is) -> static      one compilation for each architecture
                            -> interpreter one for all of them
"""
