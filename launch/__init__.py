"""Which stage runs where, and when.  Never imports torch: it runs on login nodes."""
