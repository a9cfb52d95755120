"""Other ways to make one distribution of several, behind combine_kl's signature."""

from .combine import combine_kl

COMBINERS = {"kl": combine_kl}
