"""The tables of the papers, one command each. Results in docs/papers.md."""
