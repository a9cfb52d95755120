"""The tables of the papers, one command each; results in docs/papers.md."""
