"""Which lever pays, on ten small data sets, and how far short trainings foretell it."""
