"""A package that functions of the cases need."""
from .inner import double


def twice(x):
    return double(double(x))
