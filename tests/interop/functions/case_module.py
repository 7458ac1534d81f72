
"""A module that functions of the cases need."""
OFFSET = 100


def triple(x):
    return x * 3
