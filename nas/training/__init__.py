"""Real training of candidates: two builders of one function, and what trains it.

    network (what a builder is) -+-> static       one compilation for each architecture
                                 +-> interpreter  one for all of them

The interpreter, in the order of its data:

    encoding, entries, union, switch, project -+-> reader ---------+-> spots -> interpreter
                                               +-> slots -> cells -+              -> translate

What trains a network of either:

    names, datasets -> recipe -> programs -> training -> evaluator;   weights, cache;   devices

What a candidate costs on a topology, and the program of which that is measured:

    inference -> costs
"""
