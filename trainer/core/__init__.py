"""One network learns: the loop, what it minimises, how it is measured, where it is saved."""
